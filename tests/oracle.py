"""The independent reference: tiny random checkpoints written and run by transformers on torch.

Weights are spread so that nothing is hidden: matrices keep activations near unit scale, and every bias, norm weight and
norm offset is moved away from the 0 or 1 that transformers would start it with. A dropped term changes the logits.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.cases import BOS, EOS, UNKNOWN, Case

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_SPECIAL = ["<s>", "</s>", "<unk>"]
_MERGES = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it"]
_MERGES += ["al", "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou", "io", "le"]


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE over printable ASCII with exactly ``vocab_size`` tokens (98 to 128) and a chat template."""
    characters = [chr(code) for code in range(32, 127)]
    merges = _MERGES[: vocab_size - len(_SPECIAL) - len(characters)]
    tokens = _SPECIAL + characters + merges
    if len(tokens) != vocab_size:
        raise ValueError(f"vocab_size must be {len(_SPECIAL) + len(characters)} to {len(tokens)}, got {vocab_size}")
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(pair[0], pair[1]) for pair in merges],
        unk_token=_SPECIAL[UNKNOWN],
    )
    inner = Tokenizer(model)
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=_SPECIAL[BOS],
        eos_token=_SPECIAL[EOS],
        unk_token=_SPECIAL[UNKNOWN],
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


def _randomise(model: Any, seed: int) -> None:
    # A tied embedding at full size makes the model repeat its last token; half of it lets the layers decide.
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_input_embeddings().weight if model.config.tie_word_embeddings else None
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.25 * noise)
            else:
                gain = 0.5 if parameter is tied else 1.3
                parameter.copy_(noise * gain / min(parameter.shape) ** 0.5)


def checkpoint(case: Case, root: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the case's checkpoint under ``root`` as transformers' ``save_pretrained`` does, once for all processes.

    Returns the folder: config.json, generation_config.json, model.safetensors and tokenizer files.
    """
    folder = root / f"{case.name}-{str(dtype).removeprefix('torch.')}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = root / f"{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            config = AutoConfig.for_model(case.family, **case.options)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=case.attention)
            _randomise(model, case.seed)
            model.to(dtype).save_pretrained(unfinished)
            tokenizer(case.vocab_size).save_pretrained(unfinished)
            os.rename(unfinished, folder)
    return folder


def shared_root(tmp_path_factory: Any) -> Path:
    """One folder for a whole test session, the same for every xdist worker."""
    base = Path(tmp_path_factory.getbasetemp())
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"


def prompts(case: Case, lengths: Sequence[int] = (1, 5, 19, 70)) -> list[list[int]]:
    """Random prompts of unequal lengths; the default ones cross a 64-token block."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, case.vocab_size, length).tolist() for length in lengths]


def torch_model(folder: Path, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """transformers' model of that folder, ready to run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=case.attention)
    return model.eval().to(device)


@torch.no_grad()
def torch_logits(model: Any, token_ids: Sequence[int]) -> np.ndarray:
    """float32 [T, V]: the logits of every position of one prompt, run alone and without a cache."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    return np.asarray(model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy())


@torch.no_grad()
def torch_batch_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """As ``torch_logits``, all prompts in one batch padded on the right."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), EOS)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
        mask[row, : len(prompt)] = 1
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return [logits[row, : len(prompt)].float().cpu().numpy() for row, prompt in enumerate(prompts)]


class Greedy(NamedTuple):
    """Greedy continuation and the smallest gap between the best and second best logit on the way."""

    token_ids: list[int]
    margin: float


def torch_greedy(model: Any, token_ids: Sequence[int], count: int) -> Greedy:
    """``count`` greedy tokens, each from one full forward over all tokens before it; end tokens do not stop it."""
    tokens, margin = list(token_ids), float("inf")
    for _ in range(count):
        last = torch_logits(model, tokens)[-1]
        second, first = np.partition(last, -2)[-2:]
        margin = min(margin, float(first - second))
        tokens.append(int(last.argmax()))
    return Greedy(tokens[len(token_ids) :], margin)


def rms(values: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Root-mean-square difference over all entries of all arrays."""
    squares = [np.square(one - other, dtype=np.float64) for one, other in zip(values, reference, strict=True)]
    return float(np.sqrt(np.concatenate([square.ravel() for square in squares]).mean()))
