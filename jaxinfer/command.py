"""What the commands share: groups of options, errors of one line, exit codes, and clean output.

JAX is imported by what these functions call, not here: `jaxinfer --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer import Option

from jaxinfer.errors import JaxinferError

if TYPE_CHECKING:
    from jaxinfer.engine import InferenceEngine
    from jaxinfer.generation.params import SamplingParams
    from jaxinfer.plan import Plan

FAILED, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
"""Exit codes: an error; Ctrl-C (128 + SIGINT); nobody reads the output any more (128 + SIGPIPE)."""
LONGEST_ERROR = 600
DEFAULT_SLOTS = 16
"""Slots of an engine where nobody says; that of ``init_inference``."""

# The base of all that is wrong with a command line; typer has its own copy of click, or not, depending on its version.
UsageError: type[Exception] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which model, on which devices; see :func:`jaxinfer.init_inference`."""

    model: Annotated[str, Option("--model", "-m", help="A folder, a Hugging Face hub id, or demo.", metavar="MODEL")]
    mesh: Annotated[
        str | None,
        Option(help="Axis sizes: data=2,tensor=4. Default: all devices, tensor first.", metavar="SIZES"),
    ] = None
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16. Default: the checkpoint's.")] = None
    quantize: Annotated[
        str | None, Option(help="Weights of attention and MLP: int8, int4 or fp8. Default: of the dtype.")
    ] = None
    kv_dtype: Annotated[
        str | None, Option(help="Cached keys and values: auto, int8 or fp8. Default: auto, of the dtype.")
    ] = None
    max_batch: Annotated[
        int | None, Option(help="Sequences that decode together. Default: as many as there are, up to 16.")
    ] = None
    max_model_len: Annotated[
        int | None, Option(help="Most tokens of a sequence. Default: the model's context length.")
    ] = None
    kv_blocks: Annotated[
        int | None, Option(help="Blocks of 64 cached tokens on each data shard. Default: all that fit.")
    ] = None
    load_format: Annotated[
        str, Option(help="dummy: random parameters in place of the weights, which need not be there.")
    ] = "auto"
    offload: Annotated[
        str | None, Option(help="Keep layers in host memory (host), in a store (disk), or where they fit (auto).")
    ] = None
    device_memory: Annotated[
        str | None, Option(help="What may be used of each device, such as 2GB.", metavar="SIZE")
    ] = None
    host_memory: Annotated[
        str | None, Option(help="What --offload may use of the host's memory, such as 64GB.", metavar="SIZE")
    ] = None

    kv_offload: Annotated[
        str | None,
        Option(help="With --offload: keys and values in host memory (host), or if that is faster (auto)."),
    ] = None

    def sizes(self) -> dict[str, int] | None:
        """The mesh's axis sizes, or None.

        Raises:
            ValueError: they are not of the form ``data=2,tensor=4``.
        """
        if self.mesh is None:
            return None
        sizes: dict[str, int] = {}
        for part in self.mesh.split(","):
            axis, _, size = (text.strip() for text in part.partition("="))
            if not axis or axis in sizes or not size.isdecimal():
                raise ValueError(f"--mesh: expected axis sizes such as data=2,tensor=4, got {self.mesh!r}")
            sizes[axis] = int(size)
        return sizes

    def given(self) -> dict[str, Any]:
        """What was given, as arguments of ``init_inference`` and ``plan``."""
        names = ["quantize", "kv_dtype", "max_batch", "max_model_len", "kv_blocks"]
        names += ["offload", "device_memory", "host_memory", "kv_offload"]
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given if self.load_format == "auto" else given | {"load_format": self.load_format}

    def plan(self, **changes: Any) -> Plan:
        """Plan without loading; ``changes`` are further arguments of :func:`jaxinfer.plan`."""
        import jaxinfer

        arguments: dict[str, Any] = self.given() | changes
        return jaxinfer.plan(self.model, self.sizes(), self.dtype, **arguments)

    def engine(self, progress: bool | None, *, wanted: int | None = None, **changes: Any) -> InferenceEngine:
        """Load the model; ``changes`` are further arguments of ``init_inference``.

        Args:
            progress: show bars; None shows them in a terminal.
            wanted: sequences there will be. A decode step computes every slot, used or not, so without --max-batch
                there are no more slots than that.
        """
        enough_threads()
        import jaxinfer

        slots = {} if wanted is None else {"max_batch": max(1, min(wanted, DEFAULT_SLOTS))}
        arguments: dict[str, Any] = slots | self.given() | changes
        return jaxinfer.init_inference(self.model, self.sizes(), self.dtype, progress=progress, **arguments)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue; the fields of :class:`jaxinfer.SamplingParams`."""

    max_tokens: Annotated[int | None, Option(help="Most tokens to generate; -1 is until the context ends.")] = None
    min_tokens: Annotated[int, Option(help="Tokens before which nothing ends the output.")] = 0
    temperature: Annotated[float | None, Option("--temperature", "-t", help="Divides the logits; 0 is greedy.")] = None
    top_k: Annotated[int | None, Option(help="Draw from the k most likely tokens; 0 is all.")] = None
    top_p: Annotated[float | None, Option(help="Draw from the likeliest tokens that together reach p.")] = None
    min_p: Annotated[float | None, Option(help="Draw from tokens at least p times as likely as the likeliest.")] = None
    repetition_penalty: Annotated[float | None, Option(help="Divides the logits of tokens seen; 1 is neutral.")] = None
    presence_penalty: Annotated[float, Option(help="Taken from the logits of tokens in the output.")] = 0.0
    frequency_penalty: Annotated[float, Option(help="Taken once for every time a token is in the output.")] = 0.0
    logit_bias: Annotated[
        list[str] | None,
        Option(help="Added to a token's logit; -inf forbids it. Repeatable.", metavar="TOKEN=BIAS"),
    ] = None
    stop: Annotated[list[str] | None, Option(help="A string that ends the output. Repeatable.")] = None
    stop_token_id: Annotated[list[int] | None, Option(help="A token that ends the output. Repeatable.")] = None
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False
    seed: Annotated[int | None, Option(help="The same seed gives the same text.")] = None
    include_stop_str_in_output: Annotated[
        bool, Option("--include-stop-str-in-output", help="Keep the stop string at the end of the text.")
    ] = False
    skip_special_tokens: Annotated[
        bool, Option("--skip-special-tokens/--keep-special-tokens", help="Leave special tokens out of the text.")
    ] = True

    def params(self, **more: Any) -> SamplingParams:
        """The sampling parameters; ``more`` are further fields.

        Raises:
            ValueError: naming the field.
        """
        from jaxinfer.generation.params import SamplingParams

        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        values["stop_token_ids"] = values.pop("stop_token_id", None)
        values["logit_bias"] = dict(map(_bias, values.pop("logit_bias", []))) or None
        if values.get("max_tokens") == -1:
            values["max_tokens"] = None
        return SamplingParams(**more | values)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How a command speaks."""

    json: Annotated[bool, Option("--json", help="Print one JSON document, and nothing else.")] = False
    progress: Annotated[
        bool | None, Option("--progress/--no-progress", help="Bars on stderr. Default: in a terminal.")
    ] = None
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False


def enough_threads() -> None:
    """Give XLA's CPU backend, unless NPROC is set, two threads for each virtual device; before JAX starts.

    It has one for each core, and with fewer than devices a collective can wait for ever.
    """
    wanted = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if wanted and 2 * int(wanted[1]) > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(2 * int(wanted[1])))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function ready for ``typer``'s ``app.command()``.

    Parameters that are dataclasses become one option for each field. One of them is ``output: OutputOptions``. What the
    function raises becomes one line on stderr and an exit code.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=fields[field.name]
                )
            )

    @functools.wraps(function)
    def run(**given: Any) -> None:
        built = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        with reporting(built["output"].debug):
            function(**given, **built)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn what is raised into a line on stderr (a traceback with ``debug``) and a ``typer.Exit`` with its code."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, UsageError):
        raise
    except BrokenPipeError:
        silence()
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            complain(explain(error))
        raise typer.Exit(FAILED) from None


def silence() -> None:
    """Let what is still buffered for a closed pipe go nowhere, so that Python does not complain at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def explain(error: BaseException) -> str:
    """An error in one line; one that nobody foresaw with its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST_ERROR:
        text = f"{text[:LONGEST_ERROR]}…"
    if isinstance(error, JaxinferError | ValueError | OSError):
        return text
    named = type(error).__name__
    return f"{named if text == named else f'{named}: {text}'} (--debug shows where, `jaxinfer doctor` perhaps why)"


def complain(text: str, kind: str = "error") -> None:
    """Write one line to stderr."""
    print(f"jaxinfer: {kind}: {text}", file=sys.stderr, flush=True)


def emit(document: Any) -> None:
    """Write one JSON document to stdout, indented where somebody reads it."""
    # ASCII, so that no locale can break it; NaN would not be JSON.
    print(json.dumps(document, indent=2 if sys.stdout.isatty() else None, allow_nan=False), flush=True)


def execute(app: typer.Typer, arguments: list[str] | None) -> int:
    """Run an app to its exit code, wrong command lines included."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: complain(str(message), "warning")
        # A character that the terminal's encoding lacks is no reason to stop.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = typer.main.get_command(app).main(args=arguments, prog_name="jaxinfer", standalone_mode=False)
        except UsageError as error:
            complain(" ".join(error.format_message().split()))  # type: ignore[attr-defined]
            return FAILED
        except typer.Abort:
            return INTERRUPTED
        return code if isinstance(code, int) else 0


def _bias(text: str) -> tuple[int, float]:
    token, _, amount = text.partition("=")
    try:
        return int(token), float(amount)
    except ValueError:
        raise ValueError(f"--logit-bias: expected TOKEN=BIAS such as 17=-2.5, got {text!r}") from None
