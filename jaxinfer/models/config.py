"""Reading a transformers configuration strictly: what is not understood and would change the result is an error."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError, listed

# Fields of transformers' configurations that do not change the logits of a dense decoder in inference.
NEUTRAL = frozenset(
    [
        "activation_dropout", "architectures", "attention_dropout", "attention_probs_dropout_prob",
        "attention_type", "attn_implementation", "attn_pdrop", "bos_token_id", "cache_implementation",
        "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "dropout", "dtype",
        "embd_pdrop", "embed_dropout", "embedding_dropout", "eos_token_id", "experts_implementation",
        "finetuning_task", "head_dropout", "hidden_dropout", "hidden_dropout_prob", "id2label", "init_std",
        "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "layerdrop", "model_type",
        "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
        "pretraining_tp", "problem_type", "resid_dropout", "resid_pdrop", "return_dict", "sep_token_id",
        "slow_but_exact", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype",
        "torchscript", "transformers_version", "unk_token_id", "use_cache",
    ]
)  # fmt: skip


class ConfigReader:
    """A transformers configuration that remembers which fields were read.

    Args:
        config: a ``PreTrainedConfig``.
    """

    def __init__(self, config: Any) -> None:
        """Wrap ``config``; :meth:`finish` closes the reading."""
        self._config = config
        self._read: set[str] = set()
        self.family: str = config.model_type

    def get(self, name: str, default: Any = None) -> Any:
        """Read a field; ``default`` where the configuration lacks it or holds None."""
        self._read.add(name)
        value = getattr(self._config, name, None)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """Read a positive integer.

        Raises:
            ConfigError: it is missing, not an integer, or not positive.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"{self.family} config: {name} must be a positive integer, got {value!r}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Read a positive integer, or None where the field is unset."""
        return None if self.get(name) is None else self.integer(name)

    def divide(self, name: str, by: str) -> int:
        """Read two positive integers and divide the first by the second.

        Raises:
            ConfigError: it does not divide.
        """
        value, divisor = self.integer(name), self.integer(by)
        if value % divisor:
            raise ConfigError(f"{self.family} config: {name}={value} is not a multiple of {by}={divisor}")
        return value // divisor

    def number(self, name: str, default: float | None = None) -> float:
        """Read a positive finite number.

        Raises:
            ConfigError: it is missing, not a number, not finite, or not positive.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{self.family} config: {name} must be a positive number, got {value!r}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Read a positive finite number, or None where the field is unset."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Read a boolean.

        Raises:
            ConfigError: it is missing or not a boolean.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.family} config: {name} must be true or false, got {value!r}")
        return value

    def choice(self, name: str, choices: dict[str, Any], default: str | None = None) -> Any:
        """Read a name and translate it.

        Raises:
            ConfigError: it is not one of ``choices``.
        """
        value = self.get(name, default)
        if value not in choices:
            raise ConfigError(f"{self.family} config: {name} must be one of {', '.join(choices)}, got {value!r}")
        return choices[value]

    def require(self, name: str, expected: Any) -> None:
        """Refuse any other value than the one that is implemented.

        Raises:
            ConfigError: the field is set to something else.
        """
        value = self.get(name, expected)
        if value != expected:
            raise ConfigError(f"{self.family} config: {name}={value!r} is not implemented, only {expected!r}")

    def layer_types(self, count: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """Read ``layer_types``, one name a layer, or None where it is unset.

        Raises:
            ConfigError: its length is not ``count``, or it names a type that is not in ``known``.
        """
        value = self.get("layer_types")
        if value is None:
            return None
        if len(value) != count:
            raise ConfigError(f"{self.family} config: layer_types has {len(value)} entries for {count} layers")
        if unknown := sorted(set(value) - set(known)):
            raise ConfigError(
                f"{self.family} config: layer_types {listed(unknown)} not implemented, only {listed(known)}"
            )
        return tuple(value)

    def windows(self, count: int) -> tuple[int | None, ...]:
        """Read each layer's sliding window, in tokens, from ``layer_types`` and ``sliding_window``; None sees all.

        Raises:
            ConfigError: as :meth:`layer_types`; or a layer slides and ``sliding_window`` is unset.
        """
        full, sliding = "full_attention", "sliding_attention"
        types = self.layer_types(count, (full, sliding)) or (full,) * count
        window = self.optional_integer("sliding_window")
        if window is None and sliding in types:
            raise ConfigError(f"{self.family} config: layer_types has {sliding} but sliding_window is unset")
        return tuple(window if kind == sliding else None for kind in types)

    def finish(self) -> None:
        """Refuse fields that nobody read and that are not at their class's default.

        Raises:
            ConfigError: names them; each is an option of the family that would change the result.
        """
        defaults = type(self._config)().to_dict()
        unread = []
        for name, value in self._config.to_dict().items():
            key = name.lstrip("_")
            if key in self._read or name in self._read or key in NEUTRAL or name not in defaults:
                continue  # a name that the family's own class does not know has no effect in transformers either
            if value != defaults[name] and value is not None:
                unread.append(f"{name}={value!r}")
        if unread:
            raise ConfigError(f"{self.family} config: not implemented: {listed(unread)}")


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' activation names that have an implementation here."""


def read_config(folder: Path) -> Any:
    """Read ``config.json`` of a checkpoint folder as a transformers configuration, never running code from it.

    Raises:
        ConfigError: the file is missing, not a JSON object, asks for remote code, or transformers refuses it.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no config.json; expected a checkpoint folder as transformers writes it") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    if "auto_map" in raw:
        raise ConfigError(f"{path}: auto_map asks for code from the checkpoint, which is never run")
    if raw.get("quantization_config"):
        method = (
            raw["quantization_config"].get("quant_method", "?") if isinstance(raw["quantization_config"], dict) else "?"
        )
        raise ConfigError(
            f"{path}: quantization_config: weights that are quantized already (quant_method {method!r}) are not "
            "implemented; take the checkpoint they were made from, and quantize="
        )
    _finite(raw, str(path))
    _few_layers(raw, str(path))
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises anything from KeyError to ZeroDivisionError for a bad config
        reason = re.sub(r"\s+", " ", str(error)).strip()[:300]
        raise ConfigError(f"{path}: transformers refuses it: {type(error).__name__}: {reason}") from error


def _finite(value: Any, where: str) -> None:
    """Refuse NaN and infinities anywhere in the configuration."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: numbers must be finite, got {value!r}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _finite(item, f"{where}: {key}" if ": " not in where else f"{where}.{key}")


# Several times the layers of any model there is. transformers and we make lists with an entry a layer.
MOST_LAYERS = 4096


def _few_layers(raw: dict[str, Any], where: str) -> None:
    """Refuse a number of layers whose lists alone would fill the memory."""
    counts = [(name, raw.get(name)) for name in ("num_hidden_layers", "n_layer", "num_layers")]
    groups = raw.get("attention_types")  # GPT-Neo: a list of [[kind, ...], repetitions]
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, list) and len(group) > 1:
            counts.append(("attention_types", group[1]))
    for name, count in counts:
        if isinstance(count, int) and count > MOST_LAYERS:
            raise ConfigError(f"{where}: {name} must be at most {MOST_LAYERS}, got {count}")
