"""GPU kernels and their ``jax.numpy`` references. Usable on their own; imports nothing of the other packages."""

from pallas_kernels.attention import BLOCK_SIZE as BLOCK_SIZE
from pallas_kernels.attention import SCORE_BYTES as SCORE_BYTES
from pallas_kernels.attention import Bias as Bias
from pallas_kernels.attention import attention as attention
from pallas_kernels.attention import paged_attention as paged_attention
from pallas_kernels.attention import read_blocks as read_blocks
from pallas_kernels.attention import write_blocks as write_blocks
from pallas_kernels.attention import write_cache as write_cache
from pallas_kernels.choice_table import Shapes as Shapes
from pallas_kernels.choice_table import choices as choices
from pallas_kernels.choices import Choice as Choice
from pallas_kernels.choices import Device as Device
from pallas_kernels.choices import compiling_for as compiling_for
from pallas_kernels.choices import device as device
from pallas_kernels.choices import qkv_choice as qkv_choice
from pallas_kernels.choices import rotary_cache_choice as rotary_cache_choice
from pallas_kernels.einsum import einsum_f32 as einsum_f32
from pallas_kernels.gated_gemm import gated_gemm as gated_gemm
from pallas_kernels.linear import linear as linear
from pallas_kernels.qkv_gemm import qkv_gemm as qkv_gemm
from pallas_kernels.rotary_cache import rotary_cache as rotary_cache
from pallas_kernels.skinny_gemm import InputNorm as InputNorm
from pallas_kernels.skinny_gemm import Tuning as Tuning
from pallas_kernels.skinny_gemm import normalise as normalise
from pallas_kernels.skinny_gemm import skinny_gemm as skinny_gemm
