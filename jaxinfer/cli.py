"""The command line: ``jaxinfer generate | chat | plan | convert | verify | bench | doctor``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.command import LoadOptions, OutputOptions, SamplingOptions, command, complain, emit, execute, explain
from jaxinfer.conversation import Conversation, interruptible
from jaxinfer.errors import JaxinferError

if TYPE_CHECKING:
    from jaxinfer.engine import InferenceEngine
    from jaxinfer.generation.requests import RequestOutput

app = typer.Typer(
    name="jaxinfer",
    help="Inference for Hugging Face language models in JAX, on one device or a mesh of GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes cut the names of options in a terminal of 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error, 130 after Ctrl-C.

    Args:
        arguments: those after the program's name; None is ``sys.argv``'s.
    """
    return execute(app, None if arguments is None else list(arguments))


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"jaxinfer {importlib.metadata.version('jaxinfer')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command()
@command
def generate(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts. Without any, stdin is one.")] = None,
    load: LoadOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read a prompt from a file; - is stdin.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the file or stdin is a prompt.")] = False,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Prompts are token ids: 17,4,25. Prints ids.")] = False,
    n: Annotated[int, typer.Option("--n", help="Outputs of each prompt; more than one needs a temperature.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives of each output token; needs --json.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="The same for prompts; needs --json.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its text.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print text as it comes. Default: for one prompt.")
    ] = None,
) -> None:
    """Continue prompts."""
    texts = _prompts(prompts or [], file, lines)
    asked = [_ids(text) for text in texts] if token_ids else texts
    single = len(texts) == 1 and n == 1 and not output.json and not token_ids
    if stream and not single:
        raise ValueError("--stream: only for one prompt with one output, as text")
    if not output.json and (logprobs is not None or prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs are shown with --json only")
    params = sampling.params(n=n, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    with load.engine(output.progress, wanted=len(texts) * n) as engine:
        if single and stream is not False and engine.tokenizer is not None:
            _stream(engine, engine.stream(texts[0], params), texts[0] if echo else "")
            return
        results = engine.generate(asked, params)
        if output.json:
            emit({"model": engine.name, "outputs": [result.to_dict() for result in results]})
        else:
            _write(results, echo)
    failed = [result for result in results if result.error is not None]
    for result in failed:
        complain(f"prompt {results.index(result) + 1}: {result.error}")
    if failed:
        raise typer.Exit(2)


@app.command()
@command
def chat(
    *,
    load: LoadOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
) -> None:
    """Talk with a model. /exit or Ctrl-D ends, /reset starts anew, Ctrl-C ends an answer.

    Without a terminal each line of stdin is a message. Answers end when the model ends them, or after --max-tokens.
    """
    params = sampling.params(max_tokens=None)
    interactive = sys.stdin.isatty() and not output.json
    with load.engine(output.progress, wanted=1) as engine:
        engine.chat_ids([{"role": "user", "content": "Hello"}])  # no template: say so before anybody types
        talk = Conversation(engine, params, system)
        if interactive:
            print("/exit or Ctrl-D ends, /reset starts anew, Ctrl-C ends an answer.", file=sys.stderr)
        for text in _messages(interactive):
            if text in ("/exit", "/quit"):
                break
            if text == "/reset":
                talk.reset()
            elif interactive:
                _answer(engine, talk, text)
            elif output.json:
                for _ in talk.answer(text):
                    pass
            else:
                _stream(engine, talk.answer(text))
        if output.json:
            emit({"model": engine.name, "messages": talk.messages})


@app.command()
@command
def plan(
    *,
    load: LoadOptions,
    output: OutputOptions,
    device: Annotated[
        str | None, typer.Option(help="A device that need not be here, such as H200; the mesh says how many.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's rates for the bounds.")] = False,
) -> None:
    """Say where every byte would live and what that bounds, without loading the model."""
    if measure and device is not None:
        raise ValueError("--measure: only for the devices that are here, not with --device")
    found = load.plan(device=device)
    if measure:
        import dataclasses

        import jax

        from jaxinfer.bench import measure_limits
        from jaxinfer.paging.start import measured
        from jaxinfer.pretrained import Pretrained

        devices = jax.local_devices()[: found.devices]
        found = dataclasses.replace(found, hardware=measure_limits(devices, found.dtype).hardware(found.hardware))
        with Pretrained(load.model) as pretrained:
            found = measured(found, devices, pretrained)
    emit(found.to_dict()) if output.json else print(found)


@app.command()
@command
def convert(
    *,
    model: Annotated[str, typer.Argument(help="A folder, a Hugging Face hub id, or demo.")],
    out: Annotated[Path, typer.Argument(help="The store's folder, which must not exist.")],
    output: OutputOptions,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as it is.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Weights of attention and MLP: int8, int4 or fp8. Default: as --dtype says.")
    ] = None,
) -> None:
    """Make a store of a checkpoint: orbax, with a digest for every byte. Run again, it goes on where it was."""
    from jaxinfer.checkpoints.convert import convert as run
    from jaxinfer.checkpoints.store import Store

    with Store(run(model, out, dtype, quantize=quantize, progress=output.progress)) as store:
        found = {"store": str(store.path), "tensors": len(store.tensors), "bytes": store.nbytes}
    emit(found) if output.json else print("{store}: {tensors} tensors, {bytes:,} bytes".format(**found))


@app.command()
@command
def verify(
    *,
    store: Annotated[Path, typer.Argument(help="The folder of a store.")],
    output: OutputOptions,
) -> None:
    """Read a store from end to end and hold every byte against its digest."""
    from jaxinfer.checkpoints.store import verify as run

    found = run(store, progress=output.progress)
    emit(found.to_dict()) if output.json else print(found)
    if found.faults:
        raise typer.Exit(2)


@app.command()
@command
def bench(
    *,
    load: LoadOptions,
    output: OutputOptions,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once. Repeatable. Default: 1 and 16.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens that follow, timed.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of which the median is taken.")] = 3,
) -> None:
    """Measure prefill and decode, beside what the devices can do, measured in the same run."""
    import time

    from jaxinfer.bench import bench as run
    from jaxinfer.bench import measure_limits

    batches = batch or [1, 16]
    sizes = {"max_batch": max(batches)} | load.given()
    found = load.plan(**sizes)
    # Before the engine's cache takes what memory there is.
    import jax

    limits = measure_limits(jax.local_devices()[: found.devices], found.dtype)
    start = time.perf_counter()
    with load.engine(output.progress, **sizes) as engine:
        jax.block_until_ready(engine.executor.caches)
        seconds = time.perf_counter() - start
        result = run(
            engine, batches=batches, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, repeats=repeats,
            limits=limits, progress=output.progress,
        )  # fmt: skip
    emit(result.to_dict() | {"load_seconds": seconds}) if output.json else print(result)


@app.command()
@command
def doctor(
    *,
    output: OutputOptions,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Say what will run this model.", metavar="MODEL")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure bandwidth and matmul rate.")] = True,
) -> None:
    """Look at devices, versions and settings: what will run where, and why."""
    from jaxinfer.doctor import diagnose

    found = diagnose(model, measure=measure)
    emit(found.to_dict()) if output.json else print(found)
    if not found.healthy:
        raise typer.Exit(2)


def _prompts(given: list[str], file: Path | None, lines: bool) -> list[str]:
    if given and file is not None:
        raise ValueError("give prompts as arguments or with --file, not both")
    if given:
        if lines:
            raise ValueError("--lines: only with --file or stdin")
        return given
    if file is not None and str(file) != "-":
        text = file.read_text(encoding="utf-8")
    elif file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, with --file, or on stdin")
    else:
        text = sys.stdin.read()
    if not lines:
        return [text.removesuffix("\n")]
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError("--lines: expected at least one line that is not blank, got none")
    return found


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--token-ids: expected numbers such as 17,4,25, got {text!r:.80}") from None


def _stream(engine: InferenceEngine, pieces: Iterator[str], before: str = "") -> None:
    """Print text as it comes, and a line's end after it."""
    sys.stdout.write(before)
    for piece in pieces:
        # From here on the cursor is within the text, where a bar would overwrite it.
        engine.progress = False
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)


def _answer(engine: InferenceEngine, talk: Conversation, text: str) -> None:
    """Print one answer, unless Ctrl-C ends it; what cannot be answered is said, and the conversation goes on."""
    with interruptible() as interrupted, contextlib.closing(talk.answer(text)) as pieces:  # type: ignore[type-var]

        def until_interrupted() -> Iterator[str]:
            for piece in pieces:
                yield piece
                if interrupted():
                    break

        try:
            _stream(engine, until_interrupted())
        except JaxinferError as error:
            print()
            complain(f"{explain(error)} (your message was not kept; /reset starts anew)")


def _messages(interactive: bool) -> Iterator[str]:
    """Lines from the user, without blank ones."""
    if not interactive:
        yield from (line for raw in sys.stdin if (line := raw.strip()))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  editing and history of lines
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(" (/exit or Ctrl-D ends)", file=sys.stderr)
            continue
        if line:
            yield line


def _write(results: Sequence[RequestOutput], echo: bool) -> None:
    several = sum(len(result.outputs) for result in results) > 1
    for number, result in enumerate(results, start=1):
        if result.error is not None:
            continue  # said on stderr
        for output in result.outputs:
            if several:
                print(f"--- prompt {number}, output {output.index + 1}")
            if result.prompt is not None:
                print(f"{result.prompt if echo else ''}{output.text}")
            else:
                print(*(result.prompt_token_ids if echo else ()), *output.token_ids)
