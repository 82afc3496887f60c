"""Option groups, errors and exit codes, apart from any real command."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from jaxinfer import SamplingParams
from jaxinfer.command import (
    LONGEST_ERROR,
    LoadOptions,
    OutputOptions,
    SamplingOptions,
    command,
    emit,
    enough_threads,
    execute,
    explain,
)
from jaxinfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Group:
    size: Annotated[int, typer.Option(help="How large.")]
    name: Annotated[str, typer.Option("--name", "-x")] = "nobody"


def program(body):
    """An app with one command that calls ``body`` with what it was given."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command()
    @command
    def act(
        *, words: Annotated[list[str] | None, typer.Argument()] = None, group: Group, output: OutputOptions
    ) -> None:
        body(words, group, output)

    return lambda *arguments: execute(app, list(arguments))


def test_a_dataclass_becomes_one_option_for_each_field():
    seen = []
    run = program(lambda *given: seen.append(given))
    assert run("--size", "3", "a", "b", "-x", "me", "--json", "--no-progress") == 0
    assert seen == [(["a", "b"], Group(size=3, name="me"), OutputOptions(json=True, progress=False))]
    assert run("--size", "4") == 0
    assert seen[1][1:] == (Group(size=4), OutputOptions())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("two\n  lines"), 2, "jaxinfer: error: two lines\n"),
        (OSError(2, "No such file", "x"), 2, "jaxinfer: error: [Errno 2] No such file: 'x'\n"),
        (
            ZeroDivisionError(),
            2,
            "jaxinfer: error: ZeroDivisionError (--debug shows where, `jaxinfer doctor` perhaps why)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(7), 7, ""),
    ],
)
def test_what_is_raised_becomes_a_line_and_a_code(capsys, error, code, line):
    def body(*_):
        raise error

    assert program(body)("--size", "1") == code
    assert capsys.readouterr() == ("", line)


def test_debug_shows_where(capsys):
    def body(*_):
        raise ConfigError("here")

    assert program(body)("--size", "1", "--debug") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback")
    assert "in body" in err


@pytest.mark.parametrize("arguments", [[], ["--size", "x"], ["--size"], ["--size", "1", "--what"]])
def test_a_wrong_command_line_is_one_line(capsys, arguments):
    assert program(pytest.fail)(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("jaxinfer: error: ")


def test_warnings_are_lines_too(capsys, monkeypatch):
    import warnings

    def body(*_):
        warnings.simplefilter("always")
        warnings.warn("mind this", stacklevel=1)

    assert program(body)("--size", "1") == 0
    assert capsys.readouterr().err == "jaxinfer: warning: mind this\n"


def test_a_long_error_is_cut():
    assert len(explain(ConfigError("x" * 5000))) == LONGEST_ERROR + 1


def test_json_has_no_nan(capsys):
    emit({"text": "ä\n", "none": None})
    assert json.loads(capsys.readouterr().out) == {"text": "ä\n", "none": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit(float("nan"))


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert program(lambda *_: print("naïve"))("--size", "1") == 0
    assert raw.getvalue() == b"na\\xefve\n"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("data=2,tensor=4", {"data": 2, "tensor": 4}), (" tensor = 8 ", {"tensor": 8}), (None, None)],
)
def test_mesh_sizes(text, sizes):
    assert LoadOptions(model="demo", mesh=text).sizes() == sizes


@pytest.mark.parametrize(
    "text", ["", "tensor", "tensor=", "=2", "tensor=-1", "tensor=2,tensor=4", "tensor=1.5", "a=1,"]
)
def test_wrong_mesh_sizes(text):
    with pytest.raises(ValueError, match="--mesh: expected axis sizes such as data=2,tensor=4"):
        LoadOptions(model="demo", mesh=text).sizes()


def test_only_what_was_given_is_passed_on():
    assert LoadOptions(model="demo").given() == {}
    assert LoadOptions(model="demo", max_batch=3, kv_blocks=9).given() == {"max_batch": 3, "kv_blocks": 9}
    assert LoadOptions(model="demo", kv_dtype="int8").given() == {"kv_dtype": "int8"}
    assert LoadOptions(model="demo", quantize="int4").given() == {"quantize": "int4"}
    assert LoadOptions(model="demo", load_format="dummy").given() == {"load_format": "dummy"}
    tiers = {"offload": "auto", "device_memory": "2GB", "host_memory": "64GB"}
    assert LoadOptions(model="demo", **tiers).given() == tiers


@pytest.mark.parametrize(("options", "slots"), [({}, 2), ({"max_batch": 3}, 3)])
def test_there_are_no_more_slots_than_sequences_unless_told(options, slots):
    with LoadOptions(model="demo", mesh="tensor=1", **options).engine(False, wanted=2) as engine:
        assert engine.plan.slots == slots


def test_sampling_options_are_sampling_params():
    options = SamplingOptions(
        temperature=0.5, top_k=3, stop=["a", "b"], stop_token_id=[4], logit_bias=["7=-inf", "8=1.5"], seed=9
    )
    assert options.params(n=2) == SamplingParams(
        n=2,
        temperature=0.5,
        top_k=3,
        stop=["a", "b"],
        stop_token_ids=[4],
        logit_bias={7: float("-inf"), 8: 1.5},
        seed=9,
    )


def test_every_field_of_sampling_params_has_an_option():
    import dataclasses

    fields = {field.name for field in dataclasses.fields(SamplingParams)} - {"n", "logprobs", "prompt_logprobs"}
    options = {field.name for field in dataclasses.fields(SamplingOptions)}
    assert options == fields - {"stop_token_ids"} | {"stop_token_id"}
    assert SamplingOptions().params() == SamplingParams()


def test_minus_one_token_is_until_the_context_ends():
    assert SamplingOptions(max_tokens=-1).params().max_tokens is None
    assert SamplingOptions(max_tokens=5).params(max_tokens=None).max_tokens == 5
    assert SamplingOptions().params(max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    ("flags", "set_to", "expected"),
    [
        ("--xla_force_host_platform_device_count=64", None, "128"),
        ("--xla_force_host_platform_device_count=64", "3", "3"),
        ("", None, None),
    ],
)
def test_virtual_devices_get_two_threads_each(monkeypatch, flags, set_to, expected):
    import os

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", set_to or "")
    if set_to is None:
        monkeypatch.delenv("NPROC")
    enough_threads()
    assert os.environ.get("NPROC") == expected
    monkeypatch.delenv("NPROC", raising=False)
