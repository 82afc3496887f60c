"""jaxinfer: transformer inference in JAX on GPU meshes.

``init_inference`` loads a Hugging Face checkpoint; the :class:`InferenceEngine` it returns generates, streams, chats
and scores. ``plan`` says beforehand where every byte would live.
"""

from jaxinfer.engine import InferenceEngine as InferenceEngine
from jaxinfer.engine import init_inference as init_inference
from jaxinfer.errors import CapacityError as CapacityError
from jaxinfer.errors import CheckpointError as CheckpointError
from jaxinfer.errors import ConfigError as ConfigError
from jaxinfer.errors import JaxinferError as JaxinferError
from jaxinfer.errors import RequestError as RequestError
from jaxinfer.errors import UnsafePathError as UnsafePathError
from jaxinfer.errors import UnsupportedFormatError as UnsupportedFormatError
from jaxinfer.generation.params import SamplingParams as SamplingParams
from jaxinfer.generation.requests import CompletionOutput as CompletionOutput
from jaxinfer.generation.requests import Logprob as Logprob
from jaxinfer.generation.requests import RequestOutput as RequestOutput
from jaxinfer.generation.requests import RequestOutputs as RequestOutputs
from jaxinfer.generation.requests import ScoreOutput as ScoreOutput
from jaxinfer.plan import Plan as Plan
from sharding import MeshError as MeshError
