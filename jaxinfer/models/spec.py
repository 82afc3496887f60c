"""The architecture of a decoder, and nothing else: no mesh, dtype, kernel or cache.

A family file turns a transformers configuration into a :class:`ModelSpec`. The modules are composed from its parts
once, at construction, so that no forward pass asks which family it belongs to.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jaxinfer.errors import ConfigError

Residual = Literal["pre", "post", "normed", "parallel", "parallel_two_norms", "sandwich"]
"""How attention and MLP join the residual stream ``x`` (``a`` attention, ``m`` MLP, ``n`` norms):

- ``pre``: ``x += a(n1(x)); x += m(n2(x))`` (GPT-2, Llama, ...)
- ``post``: ``x = n1(x + a(x)); x = n2(x + m(x))`` (OPT-350m)
- ``normed``: ``x = n1(x); x += a(x); x = n2(x); x += m(x)`` (BLOOM with post-layernorm residuals)
- ``parallel``: ``h = n1(x); x += a(h) + m(h)`` (GPT-J, Falcon-7B)
- ``parallel_two_norms``: ``x += a(n1(x)) + m(n2(x))`` (GPT-NeoX, Falcon-40B)
- ``sandwich``: ``x += n1b(a(n1(x))); x += n2b(m(n2(x)))`` (Gemma 2 and 3)
"""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation over the hidden axis, computed in float32.

    Attributes:
        kind: ``rms`` or ``layer`` (mean subtracted).
        eps: added to the mean square (variance) before the square root.
        weight: whether there is a learned factor.
        bias: whether there is an additive bias.
        unit_offset: the stored weight is the distance from one (Gemma).
    """

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    unit_offset: bool = False


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding of the first ``2 * len(inv_freq)`` entries of each head.

    Attributes:
        inv_freq: radians per position, one for each rotated pair, scaling already applied.
        interleaved: pairs are neighbours (GPT-J) rather than halves (Llama).
        attention_factor: multiplies cos and sin (YaRN, LongRoPE).
        long_inv_freq: frequencies for sequences that may exceed ``long_from`` tokens (LongRoPE), else None.
        long_from: the length, in tokens, up to which ``inv_freq`` applies; None where there is one set only.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False
    attention_factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    long_from: int | None = None

    def kind_in(self, head_dim: int) -> Literal["halves", "partial", "interleaved"]:
        """Which entries of a head are mixed, as :data:`pallas_kernels.choices.RotaryKind` calls it."""
        if self.interleaved:
            return "interleaved"
        return "halves" if 2 * len(self.inv_freq) == head_dim else "partial"


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """Attention with linear biases: ``slope[head] * key_position`` is added to the scores.

    Attributes:
        slopes: one for each query head.
        scaled: the bias is added before the scores are scaled (Falcon), not after (BLOOM).
        bfloat16: slopes, positions and their product are rounded to bfloat16 whatever the dtype of the model (Falcon).
    """

    slopes: tuple[float, ...]
    scaled: bool = False
    bfloat16: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What may differ from layer to layer.

    Attributes:
        scale: multiplies the attention scores.
        window: a query sees itself and the ``window - 1`` tokens before it; None sees all.
        rotary: this layer's rotary embedding, if any.
    """

    scale: float
    window: int | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        family: transformers' ``model_type``.
        vocab_size: rows of the token embedding, in tokens.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads, kv_heads, head_dim: of attention; ``heads`` is a multiple of ``kv_heads``.
        context_length: the most tokens a sequence may have, prompt and output together.
        layers: one entry a layer.
        norm: the norm used before, after and between layers.
        residual: how attention and MLP join the residual stream.
        activation, gated_mlp, mlp_bias: of the MLP; a gated one computes ``act(gate(x)) * up(x)``.
        qkv_bias, out_bias: biases of the attention projections.
        qk_norm: a norm over each head's query and key before rotation, or None.
        softcap: scores become ``softcap * tanh(scores / softcap)``, or None.
        alibi: linear position biases, or None.
        learned_positions: rows of the position table that are used, or None.
        position_offset: added to a position before the table is read (OPT: 2).
        embedding_dim: width of the token embedding where it differs from ``hidden`` (OPT-350m), else None.
        embedding_scale: multiplies the token embedding; rounded to the model's dtype first (Gemma), or None.
        embedding_norm: a norm right after the embedding (BLOOM).
        final_norm: a norm before the head.
        tied_head: the head is the token embedding.
        head_bias: the head has a bias (GPT-J).
        logit_softcap: as ``softcap``, for the logits, or None.
    """

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    norm: Norm
    residual: Residual = "pre"
    activation: Activation = "silu"
    gated_mlp: bool = False
    mlp_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    softcap: float | None = None
    alibi: Alibi | None = None
    learned_positions: int | None = None
    position_offset: int = 0
    embedding_dim: int | None = None
    embedding_scale: float | None = None
    embedding_norm: bool = False
    final_norm: bool = True
    tied_head: bool = False
    head_bias: bool = False
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have.

        Raises:
            ConfigError: a size is not positive, or heads do not divide.
        """
        for name in ("vocab_size", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(f"{self.family}: {name} must be a positive integer, got {value!r}")
        if not self.layers:
            raise ConfigError(f"{self.family}: the model has no layers")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.family}: {self.heads} heads are not a multiple of {self.kv_heads} kv_heads")
        for index, layer in enumerate(self.layers):
            if layer.window is not None and layer.window < 1:
                raise ConfigError(f"{self.family}: window of layer {index} must be at least 1, got {layer.window}")
            if layer.rotary is not None and 2 * len(layer.rotary.inv_freq) > self.head_dim:
                raise ConfigError(
                    f"{self.family}: layer {index} rotates {2 * len(layer.rotary.inv_freq)} entries of a head of "
                    f"{self.head_dim}"
                )
        if self.alibi is not None and len(self.alibi.slopes) != self.heads:
            raise ConfigError(f"{self.family}: {len(self.alibi.slopes)} ALiBi slopes for {self.heads} heads")

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def long_from(self) -> int | None:
        """Length from which a sequence takes the long rotary frequencies, in tokens, or None."""
        return next((s.rotary.long_from for s in self.layers if s.rotary and s.rotary.long_from), None)

    def replace(self, **changes: object) -> ModelSpec:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a spec is laid out for a number of tensor-parallel devices.

    Attributes:
        kv_groups: key/value heads that are stored: ``kv_heads``, or one for each device where there are more devices
            than heads; then neighbouring groups hold copies of one head.
        vocab_rows: rows of the stored embedding and head, padded with zeros to a multiple of the devices.
        tensor: the devices.
    """

    kv_groups: int
    vocab_rows: int
    tensor: int = 1

    @classmethod
    def of(cls, spec: ModelSpec, tensor: int = 1) -> Layout:
        """The layout of ``spec`` over ``tensor`` devices."""
        rows = -(-spec.vocab_size // tensor) * tensor
        return cls(kv_groups=max(spec.kv_heads, tensor), vocab_rows=rows, tensor=tensor)
