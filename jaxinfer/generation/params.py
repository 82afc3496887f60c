"""What a user may ask of generation, and how it becomes concrete numbers for one checkpoint."""

from __future__ import annotations

import enum
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np

from jaxinfer.errors import ConfigError, listed

MAX_LOGPROBS: Final = 20
"""Most alternatives that ``logprobs`` and ``prompt_logprobs`` may ask for (vLLM's default limit)."""
GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are greedy (vLLM's threshold)."""
DEFAULT_MAX_TOKENS: Final = 16
_MAX_BIAS: Final = 1e4  # float32 still tells logits 1e-3 apart at this size


class Unset(enum.Enum):
    """Marks a field that was not given, where None already has a meaning."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "unset"


UNSET: Final = Unset.UNSET


def _fail(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {value!r}")


def _integer(name: str, value: object, low: int, expected: str, high: int | None = None) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise _fail(name, expected, value)
    if value < low or (high is not None and value > high):
        raise _fail(name, expected, value)
    return int(value)


def _number(name: str, value: object, expected: str, allowed: Callable[[float], bool]) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise _fail(name, expected, value)
    try:
        number = float(value)
    except OverflowError:
        raise _fail(name, expected, value) from None
    if not math.isfinite(number) or not allowed(number):
        raise _fail(name, expected, value)
    return number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _fail(name, "True or False", value)
    return bool(value)


def _temperature(name: str, value: object) -> float:
    return _number(name, value, "a finite number >= 0 (0 is greedy)", lambda x: x >= 0)


def _top_k(name: str, value: object) -> int:
    return max(_integer(name, value, -1, "an integer >= 1, or 0 or -1 for no limit"), 0)


def _top_p(name: str, value: object) -> float:
    return _number(name, value, "a number in (0, 1]", lambda x: 0 < x <= 1)


def _min_p(name: str, value: object) -> float:
    return _number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)


def _repetition(name: str, value: object) -> float:
    return _number(name, value, "a finite number > 0 (1 is neutral)", lambda x: x > 0)


def _max_tokens(name: str, value: object) -> int:
    return _integer(name, value, 1, "an integer >= 1")


def _penalty(name: str, value: object) -> float:
    return _number(name, value, "a number in [-2, 2] (0 is neutral)", lambda x: -2 <= x <= 2)


def _logprobs(name: str, value: object) -> int:
    return _integer(name, value, 0, f"None or an integer in [0, {MAX_LOGPROBS}]", MAX_LOGPROBS)


def _stop(value: object) -> tuple[str, ...]:
    expected = "None, a string or a list of strings, none of them empty"
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item for item in items):
        raise _fail("stop", expected, value)
    return tuple(dict.fromkeys(items))


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        raise _fail("stop_token_ids", "None or a list of token ids", value)
    return tuple(dict.fromkeys(_integer("stop_token_ids", item, 0, "token ids >= 0") for item in value))


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _fail("logit_bias", "None or a dict of token id -> bias", value)
    expected = f"biases in [-{_MAX_BIAS:g}, {_MAX_BIAS:g}], or -inf to forbid a token"
    bias = {}
    for token, amount in value.items():
        token = _integer("logit_bias", token, 0, "token ids >= 0 as keys")
        forbidden = isinstance(amount, (float, np.floating)) and amount == -math.inf
        bias[token] = -math.inf if forbidden else _number("logit_bias", amount, expected, lambda x: abs(x) <= _MAX_BIAS)
    return bias


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; names and meanings as in vLLM's ``SamplingParams``.

    ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and ``max_tokens`` that are left out come
    from the checkpoint's ``generation_config.json`` where it sets them, else they are neutral (temperature 1.0,
    max_tokens 16): see `GenerationDefaults` for the rules. Every bad value is a ValueError that names the field.

    Attributes:
        n: how many completions of each prompt; more than one needs temperature > 0.
        max_tokens: most tokens to generate; None is "until the context ends"; left out is as said above.
        min_tokens: tokens before which no end-of-sequence token or stop token can be drawn and no stop string counts.
        temperature: logits are divided by it; 0 (anything under 1e-5) is greedy.
        top_k: draw from the k most likely tokens; 0 or -1 is no limit.
        top_p: draw from the fewest most likely tokens whose probabilities reach top_p, in (0, 1].
        min_p: draw from tokens at least min_p times as likely as the most likely one, in [0, 1].
        repetition_penalty: logits of tokens seen in prompt or output are divided (if positive) or multiplied by it.
        presence_penalty: taken from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: taken once for every time a token is in the output, in [-2, 2].
        logit_bias: token id -> number added to its logit; -inf forbids the token.
        stop: one string or several that end the output; they are cut from the text.
        stop_token_ids: tokens that end the output as the end-of-sequence token does.
        ignore_eos: go on after an end-of-sequence token.
        seed: in [0, 2**64); the same seed gives the same tokens whatever else runs beside the request.
        logprobs: how many of the most likely tokens to report per output token beside the drawn one, 0 to 20; the
            log-probabilities are those of the model, before penalties, temperature and truncation.
        prompt_logprobs: the same for the tokens of the prompt.
        include_stop_str_in_output: keep the stop string (and the text of a stop token) at the end of the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    n: int = 1
    max_tokens: int | Unset | None = UNSET
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def put(name: str, check: Callable[[str, Any], object], optional: bool = False) -> None:
            value = getattr(self, name)
            if not (optional and value is None):
                object.__setattr__(self, name, check(name, value))

        put("n", lambda name, value: _integer(name, value, 1, "an integer >= 1"))
        if self.max_tokens is not UNSET:
            put("max_tokens", _max_tokens, optional=True)
        put("min_tokens", lambda name, value: _integer(name, value, 0, "an integer >= 0"))
        put("temperature", _temperature, optional=True)
        put("top_k", _top_k, optional=True)
        put("top_p", _top_p, optional=True)
        put("min_p", _min_p, optional=True)
        put("repetition_penalty", _repetition, optional=True)
        put("presence_penalty", _penalty)
        put("frequency_penalty", _penalty)
        put("logit_bias", lambda _, value: _logit_bias(value))
        put("stop", lambda _, value: _stop(value))
        put("stop_token_ids", lambda _, value: _stop_token_ids(value))
        seed_range = "None or an integer in [0, 2**64)"
        put("seed", lambda name, value: _integer(name, value, 0, seed_range, 2**64 - 1), optional=True)
        put("logprobs", _logprobs, optional=True)
        put("prompt_logprobs", _logprobs, optional=True)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            put(name, _flag)
        if isinstance(self.max_tokens, int) and self.min_tokens > self.max_tokens:
            raise _fail("min_tokens", f"at most max_tokens={self.max_tokens}", self.min_tokens)
        if self.temperature is not None:
            _check_n(self.n, self.temperature, "")

    def resolve(
        self,
        generation_config: Mapping[str, Any] | GenerationDefaults,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        seed: int = 0,
    ) -> ResolvedParams:
        """Every field as a concrete value for one checkpoint.

        Args:
            generation_config: the checkpoint's generation_config.json (or ``{}``), or its `GenerationDefaults`. An
                engine should read it once with `GenerationDefaults.read`, which checks it and warns.
            eos_token_ids: tokens that end a sequence; ids outside the vocabulary can never be drawn and are dropped.
            vocab_size: number of tokens that can be drawn.
            seed: used where the user gave none.

        Raises:
            ValueError: a token id outside the vocabulary, or values that contradict the checkpoint's defaults.
            ConfigError: a bad value in the generation_config.
        """
        if isinstance(generation_config, GenerationDefaults):
            defaults = generation_config
        else:
            defaults = GenerationDefaults.read(generation_config)
        bias, stop_ids = self.logit_bias or {}, self.stop_token_ids or ()
        for name, ids in (("logit_bias", bias), ("stop_token_ids", stop_ids)):
            outside = [token for token in ids if token >= vocab_size]
            if outside:
                raise ValueError(f"{name}: expected token ids under {vocab_size}, got {listed(outside)}")
        max_tokens = defaults.max_tokens if self.max_tokens is UNSET else self.max_tokens
        if max_tokens is not None and self.min_tokens > max_tokens:
            hint = f"at most max_tokens={max_tokens} (which was not given and is the default of this checkpoint)"
            raise _fail("min_tokens", hint, self.min_tokens)
        temperature = defaults.temperature if self.temperature is None else self.temperature
        _check_n(self.n, temperature, " (temperature was not given, and this checkpoint's default is greedy)")
        eos = frozenset() if self.ignore_eos else frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        return ResolvedParams(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(sorted(bias.items())),
            stop=tuple(self.stop or ()),
            stop_token_ids=frozenset(stop_ids),
            eos_token_ids=eos,
            seed=seed % 2**64 if self.seed is None else self.seed,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if self._given(f.name, f.default)]
        return f"SamplingParams({', '.join(given)})"

    def _given(self, name: str, default: object) -> bool:
        value = getattr(self, name)
        return value != default and not (value == () and default is None)


def _check_n(n: int, temperature: float, reason: str) -> None:
    if n > 1 and temperature < GREEDY_BELOW:
        raise _fail("n", f"1 with greedy sampling (temperature 0){reason}, since all n outputs would be equal", n)


@dataclass(frozen=True, kw_only=True)
class ResolvedParams:
    """`SamplingParams` made concrete for one checkpoint; top_k 0, top_p 1, min_p 0 and penalties 1/0/0 are off.

    ``eos_token_ids`` is empty under ``ignore_eos``; ``max_tokens`` None is "until the context ends"; ``seed`` is in
    [0, 2**64); ``temperature`` 0 is greedy.
    """

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    seed: int
    logprobs: int | None
    prompt_logprobs: int | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end the output once ``min_tokens`` are there."""
        return self.stop_token_ids | self.eos_token_ids

    def outputs(self) -> tuple[ResolvedParams, ...]:
        """One set of parameters (n = 1) for each of the n outputs; the first keeps the seed, the others derive one."""
        seeds = (self.seed, *(derive_seed(self.seed, index) for index in range(1, self.n)))
        return tuple(replace(self, n=1, seed=seed) for seed in seeds)


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for a part of what ``seed`` covers (a request, an output); the same on every machine."""
    text = ",".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json says about the fields that a user left out.

    ``max_new_tokens`` is max_tokens, ``repetition_penalty`` is itself. ``temperature``, ``top_k``, ``top_p`` and
    ``min_p`` count unless ``do_sample`` is explicitly false, which means greedy (temperature 0), as in transformers.
    Without any ``do_sample`` transformers would be greedy and vLLM samples: this follows vLLM, with temperature 1.0
    where the file has none. transformers' own default of top_k 50 is not adopted (vLLM does not either).
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GenerationDefaults:
        """Check a generation_config and take the defaults from it.

        Options that would change the output under transformers and that jaxinfer does not have (beams, n-gram bans,
        forced tokens, guidance, ...) are named in one UserWarning and ignored, as vLLM ignores them: a checkpoint
        stays usable, and nothing is ignored silently.

        Raises:
            ConfigError: a value of a wrong type or range, naming it.
        """
        values: dict[str, Any] = {}

        def take(key: str, name: str, check: Callable[[str, object], object]) -> None:
            if config.get(key) is not None:
                try:
                    values[name] = check(f"generation_config: {key}", config[key])
                except ValueError as error:
                    raise ConfigError(str(error)) from None

        take("do_sample", "do_sample", _flag)
        take("max_new_tokens", "max_tokens", _max_tokens)
        take("repetition_penalty", "repetition_penalty", _repetition)
        take("temperature", "temperature", _temperature)
        take("top_k", "top_k", _top_k)
        take("top_p", "top_p", _top_p)
        take("min_p", "min_p", _min_p)
        if values.pop("do_sample", True) is False:
            for name in ("top_k", "top_p", "min_p"):
                values.pop(name, None)
            values["temperature"] = 0.0
        ignored = [key for key, neutral in _IGNORED.items() if not _neutral(config.get(key), neutral)]
        if ignored:
            warnings.warn(
                f"generation_config sets {listed(ignored)}: not supported and ignored; output will differ from that "
                "of transformers' generate()",
                stacklevel=2,
            )
        return cls(**values)


# Options of transformers' GenerationConfig that change what is generated -> the values that leave it unchanged.
_IGNORED: Final[dict[str, tuple[object, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": ([], ""),
    "typical_p": (1,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "watermarking_config": ({},),
    "dola_layers": (),
}


def _neutral(value: object, neutral: tuple[object, ...]) -> bool:
    return value is None or any(value == item for item in neutral)
