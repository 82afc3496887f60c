"""The commands as people call them: what is on stdout, what is on stderr, and the exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxinfer
from jaxinfer.cli import app, main
from tests.cases import case
from tests.oracle import checkpoint, shared_root, torch_greedy, torch_model

LLAMA = case("llama-plain")
ONE = ("--mesh", "data=1")
PROMPT = "the rest is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(checkpoint(LLAMA, shared_root(tmp_path_factory)))


@pytest.fixture(scope="module")
def greedy(folder):
    """transformers' own eight greedy tokens after PROMPT, and their text."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    ids = words(PROMPT)["input_ids"]
    tokens = torch_greedy(torch_model(folder, LLAMA), ids, 8).token_ids
    return tokens, words.decode(tokens, skip_special_tokens=True)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process; gives exit code, stdout and stderr."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "jaxinfer", *map(str, arguments)],
        capture_output=True, text=True, timeout=200, check=False, **options,
    )  # fmt: skip


def one_line(stderr: str) -> str:
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    return stderr.strip()


def generate_arguments(folder, *more):
    return ("generate", "-m", folder, *ONE, "--temperature", 0, "--max-tokens", 8, "--ignore-eos", *more)


def test_one_prompt_is_streamed_and_is_what_transformers_writes(run, folder, greedy):
    assert run(*generate_arguments(folder, PROMPT)) == (0, greedy[1] + "\n", "")
    assert run(*generate_arguments(folder, "--no-stream", "--echo", PROMPT)) == (0, PROMPT + greedy[1] + "\n", "")


def test_json_is_one_document_with_the_tokens_of_transformers(run, folder, greedy):
    code, out, err = run(*generate_arguments(folder, "--json", "--logprobs", 2, PROMPT, "another"))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["model"] == folder
    first, second = document["outputs"]
    assert first["outputs"][0]["token_ids"] == greedy[0]
    assert first["outputs"][0]["finish_reason"] == "length"
    assert len(first["outputs"][0]["logprobs"][0]) == 2  # greedy: the drawn token is the likeliest
    assert second["prompt"] == "another"


def test_prompts_come_from_stdin_and_files(run, folder, greedy, tmp_path):
    assert run(*generate_arguments(folder), stdin=PROMPT + "\n") == (0, greedy[1] + "\n", "")
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nof it\n")
    code, out, _ = run(*generate_arguments(folder, "--file", file, "--lines"))
    assert code == 0
    assert out.startswith(f"--- prompt 1, output 1\n{greedy[1]}\n--- prompt 2, output 1\n")


def test_prompts_may_be_token_ids(run, folder, greedy):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    code, out, _ = run(*generate_arguments(folder, "--token-ids", ",".join(map(str, ids))))
    assert (code, out.split()) == (0, [str(token) for token in greedy[0]])


def test_a_prompt_that_cannot_be_served_does_not_harm_the_others(run, folder, greedy):
    long = "the " * 200
    code, out, err = run(*generate_arguments(folder, PROMPT, long))
    assert (code, out) == (2, f"--- prompt 1, output 1\n{greedy[1]}\n")
    assert re.match(r"jaxinfer: error: prompt 2: prompt: \d+ tokens, and the context length is 256", one_line(err))


def test_seeds_make_sampling_repeatable(run, folder):
    def write(seed):
        return run("generate", "-m", folder, *ONE, "-t", 1.5, "--max-tokens", 20, "--seed", seed, "--no-stream", PROMPT)

    assert write(1) == write(1)
    assert write(1) != write(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-m", "nowhere/at-all", "x"], "nowhere/at-all: no such folder"),
        (["generate", "x"], "Missing option '--model'"),
        (["generate", "-m", "FOLDER", "--top-p", "2", "x"], "top_p: expected a number in (0, 1], got 2.0"),
        (["generate", "-m", "FOLDER", "--top-p", "much", "x"], "'--top-p'"),
        (["generate", "-m", "FOLDER", "--mesh", "tensor", "x"], "--mesh: expected axis sizes such as data=2,tensor=4"),
        (["generate", "-m", "FOLDER", "--mesh", "tensor=3", "x"], "The nearest mesh that works is"),
        (["generate", "-m", "FOLDER", "--logit-bias", "1:2", "x"], "--logit-bias: expected TOKEN=BIAS"),
        (["generate", "-m", "FOLDER", "--stream", "x", "y"], "--stream: only for one prompt"),
        (["generate", "-m", "FOLDER", "--logprobs", "1", "x"], "are shown with --json only"),
        (["generate", "-m", "FOLDER", "--token-ids", "x"], "--token-ids: expected numbers"),
        (["generate", "-m", "FOLDER", "--token-ids", "1000"], "prompt: token 0 is 1000"),
        (["generate", "-m", "FOLDER", "--file", "/nowhere/prompts"], "No such file or directory: '/nowhere/prompts'"),
        (["generate", "-m", "FOLDER", "--file", "x", "y"], "not both"),
        (["generate", "-m", "FOLDER", "--lines", "x"], "--lines: only with --file or stdin"),
        (["generate", "-m", "FOLDER", "--lines"], "--lines: expected at least one line"),
        (["generate", "-m", "FOLDER", "--dtype", "int3", "x"], "dtype: expected one of float32"),
        (["plan", "-m", "FOLDER", "--device", "abacus"], "device 'abacus' is not known; known are H200"),
        (["plan", "-m", "FOLDER", "--quantize", "int4"], "attention.qkv: int4 has groups of 128 or 64 inputs"),
        (["generate", "-m", "FOLDER", "--quantize", "q8", "x"], "quantize: expected None or one of int8, int4, fp8"),
        (["generate", "-m", "FOLDER", "--offload", "disk", "x"], "make one with `jaxinfer convert MODEL STORE`"),
        (["generate", "-m", "FOLDER", "--offload", "host", "--device-memory", "1KB", "x"], "paging needs"),
        (["plan", "-m", "FOLDER", "--offload", "gpu"], "offload: expected None or one of host, disk, auto, got 'gpu'"),
        (["plan", "-m", "FOLDER", "--device", "H200", "--measure"], "--measure: only for the devices that are here"),
        (["plan", "-m", "FOLDER", "--device", "H200", "--mesh", "tensor=8"], "4 heads cannot be divided by tensor=8"),
        (["bench", "-m", "FOLDER", "--mesh", "data=1", "--prompt-tokens", "300"], "the context length is 256"),
        (["generate", "-m", "FOLDER", "--frobnicate"], "No such option: --frobnicate"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(run, folder, arguments, message):
    code, out, err = run(*(folder if argument == "FOLDER" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert one_line(err).startswith("jaxinfer: error: ")
    assert message in err


def test_debug_shows_the_traceback(run):
    code, out, err = run("generate", "-m", "nowhere/at-all", "--debug", "x")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback")
    assert "jaxinfer.errors.CheckpointError: nowhere/at-all" in err


def test_plan_shows_bytes_and_bounds_without_loading(run, folder):
    code, out, err = run("plan", "-m", folder, "--mesh", "tensor=2", "--device", "H200")
    assert (code, err) == (0, "")
    for words in ("weights (device)", "KV cache (device)", "host", "disk", "fits", "yes", "2 x H200", "ms"):
        assert words in out


def test_plan_as_json_counts_the_bytes_of_the_file(run, folder):
    code, out, err = run("plan", "-m", folder, "--device", "H200", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    stored = jaxinfer.pretrained.Checkpoint(folder)  # float32, one device: no padding, no copies
    assert found["per_device"]["weight_bytes"] == found["weight_bytes"] == stored.nbytes
    stored.close()
    assert found["fits"] is True
    assert found["tiers"] == {"device": found["per_device"]["total_bytes"], "host": 0, "disk": 0}
    # All weights but the embedding, whose rows are looked up (it is not tied), and 256 cached tokens.
    cached = 2 * 2 * 2 * (48 // 4) * 256 * 4
    looked_up = 101 * 48 * 4
    expected = 1e3 * (stored.nbytes - looked_up + cached) / 4.22e12
    assert found["bounds"]["step_ms"]["batch_1"] == pytest.approx(expected)


def test_quantized_weights_take_fewer_bytes_in_plans_and_stores(run, folder, tmp_path):
    plain = json.loads(run("plan", "-m", folder, "--device", "H200", "--json")[1])
    asked = json.loads(run("plan", "-m", folder, "--device", "H200", "--quantize", "int8", "--json")[1])
    assert (plain["quantize"], asked["quantize"]) == (None, "int8")
    assert asked["weight_bytes"] < 0.6 * plain["weight_bytes"]
    assert asked["parameters"] == plain["parameters"]
    code, out, _ = run("convert", folder, tmp_path / "store", "--quantize", "int8", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == asked["weight_bytes"]
    stored = json.loads(run("plan", "-m", tmp_path / "store", "--device", "H200", "--json")[1])
    assert stored == asked


def test_layers_from_disk_write_the_same_text(run, folder, greedy, tmp_path):
    store = tmp_path / "store"
    assert run("convert", folder, store)[0] == 0
    paged = ("--offload", "disk", "--device-memory", "2GB")
    assert run(*generate_arguments(store, PROMPT, *paged)) == (0, f"{greedy[1]}\n", "")
    code, out, _ = run("plan", "-m", store, *paged, "--json", "--measure")
    found = json.loads(out)["paging"]
    assert code == 0
    assert found["layers"] == {"device": [], "host": [], "disk": [0, 1]}
    assert found["bounds"]["step_ms"] > 0
    assert found["disk_bytes_per_second"] > 0


def test_plan_for_more_devices_than_there_are(run, folder):
    found = json.loads(run("plan", "-m", folder, "--device", "h200", "--mesh", "data=64,tensor=4", "--json")[1])
    assert found["mesh"] == {"data": 64, "pipe": 1, "expert": 1, "tensor": 4}
    assert found["tiers"]["device"] == 256 * found["per_device"]["total_bytes"]


def test_plan_with_measured_rates(run, folder):
    found = json.loads(run("plan", "-m", folder, *ONE, "--measure", "--json")[1])
    assert found["bounds"]["measured"]
    assert found["bounds"]["step_ms"]["batch_1"] > 0


def test_a_plan_that_does_not_fit_says_so(folder):
    tiny = jaxinfer.hardware.Hardware(kind="tiny", memory=100_000, bandwidth=1e9, matmul=1e9)
    found = jaxinfer.plan(folder, device=tiny)
    assert found.fits is False
    assert "no" in str(found)


def test_plan_checks_the_tensors(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(jaxinfer.CheckpointError, match="wrong shape"):
        jaxinfer.plan(copy, device="H200")


def test_doctor_in_words_and_as_json(run):
    code, out, err = run("doctor", "--no-measure")
    assert (code, err) == (0, "")
    assert "cpu 7" in out
    assert "decode attention: dot (XLA), because" in out
    document = json.loads(run("doctor", "--no-measure", "--json")[1])
    assert document["healthy"]


def test_bench_as_json(run, folder):
    small = ("--batch", 2, "--prompt-tokens", 20, "--decode-tokens", 20, "--repeats", 1)
    code, out, err = run("bench", "-m", folder, *ONE, *small, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["decode"][0]["steps"] == 32
    assert document["limits"]["bandwidth"] > 0
    assert document["load_seconds"] > 0


def test_chat_keeps_the_conversation(run, folder):
    code, out, err = run(
        "chat", "-m", folder, *ONE, "-t", 0, "--max-tokens", 4, "--system", "be brief", "--json",
        stdin="hello\n\nand you\n/exit\nnever said\n",
    )  # fmt: skip
    assert (code, err) == (0, "")
    messages = json.loads(out)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "and you"
    with jaxinfer.init_inference(folder, {"data": 1}, progress=False) as engine:
        params = jaxinfer.SamplingParams(temperature=0, max_tokens=4)
        for end in (2, 4):
            assert engine.chat(messages[:end], params).outputs[0].text == messages[end]["content"]


def test_chat_streams_an_answer_for_each_line(run, folder):
    code, out, _ = run("chat", "-m", folder, *ONE, "-t", 0, "--max-tokens", 4, stdin="hello\n/reset\nhello\n")
    first, second = out.splitlines()
    assert code == 0
    assert first == second


def test_chat_refuses_when_the_context_is_full(run, folder):
    code, _, err = run("chat", "-m", folder, *ONE, "--max-model-len", 32, stdin="word " * 40)
    assert code == 2
    assert "and the context length is 32" in one_line(err)


def test_help_names_the_commands_and_the_options():
    shown = CliRunner().invoke(app, ["--help"]).output
    for name in ("generate", "chat", "plan", "bench", "doctor"):
        assert name in shown
        assert "--json" in CliRunner().invoke(app, [name, "--help"]).output


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"jaxinfer \d+\.\d+\.\d+\S*\n", out)


def test_help_does_not_wait_for_jax():
    script = (
        "import sys; from jaxinfer.cli import main; code = main(['--help']); print(sorted(sys.modules)); exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    modules = found.stdout.splitlines()[-1]
    for heavy in ("'jax'", "'numpy'", "'transformers'", "'huggingface_hub'"):
        assert heavy not in modules


def test_as_a_module_it_is_a_program(folder, greedy):
    ended = process(*generate_arguments(folder, PROMPT))
    assert (ended.returncode, ended.stdout) == (0, greedy[1] + "\n")
    ended = process("generate", "-m", "nowhere/at-all", "x")
    assert (ended.returncode, ended.stdout) == (2, "")
    one_line(ended.stderr)


def test_ctrl_c_is_exit_code_130(folder):
    # Started where Ctrl-C is ignored, Python does not listen to it; a shell's own children do.
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from jaxinfer.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["generate", "-m", folder, *ONE, "-t", "0", "--max-tokens", "-1", "--ignore-eos", PROMPT]
    started = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.read(1)  # it writes, and compiles for longer contexts on its way to 256 tokens
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=100)
    assert (started.returncode, err) == (130, "")


def test_a_broken_pipe_is_quiet(folder):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "jaxinfer", "plan", "-m", folder, "--device", "H200"],
            stdout=closed, stderr=subprocess.PIPE, text=True, timeout=100, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (141, "")


def test_ctrl_c_ends_an_answer_and_not_the_chat(folder):
    mine, theirs = pty.openpty()
    arguments = ["chat", "-m", folder, *ONE, "-t", "0", "--ignore-eos", "--no-progress"]
    # Where the tests run in the background, Ctrl-C is ignored, and a program would inherit that.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('jaxinfer', run_name='__main__', alter_sys=True)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"TERM": "dumb", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(pattern: str, start: int = 0, press: bool = False) -> int:
        nonlocal seen
        deadline = time.monotonic() + 100
        while not (found := re.compile(pattern, re.DOTALL).search(seen, start)):
            if time.monotonic() > deadline:
                started.send_signal(signal.SIGABRT)  # says where every thread is
                time.sleep(1)
                pytest.fail(f"no {pattern!r} in {seen + os.read(mine, 1 << 16).decode()}")
            if press:
                started.send_signal(signal.SIGINT)
            if select.select([mine], [], [], 1)[0]:
                try:
                    seen += os.read(mine, 4096).decode()
                except OSError:  # the other side has ended
                    break
        assert found, seen
        return found.end()

    try:
        place = until("> ")
        os.write(mine, b"hello\n")
        place = until(r"hello\r\n.", place)
        started.send_signal(signal.SIGINT)
        place = until("\r\n.*> ", place)
        # At the prompt: a hint. Pressed once a second, for one may fall between the prompt and its wait for a key.
        place = until(r"\(/exit or Ctrl-D ends\)", place, press=True)
        place = until("> ", place)
        os.write(mine, b"again\n")
        place = until(r"again\r\n.", place)
        started.send_signal(signal.SIGINT)
        until("\r\n.*> ", place)
        os.write(mine, b"\x04")
        assert started.wait(timeout=60) == 0
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
        os.close(mine)


def test_json_survives_numbers_that_json_lacks(run, folder):
    code, out, _ = run(*generate_arguments(folder, "--json", "--logprobs", 20, "--logit-bias", "5=-inf", PROMPT))
    assert code == 0
    tokens = json.loads(out, parse_constant=pytest.fail)["outputs"][0]["outputs"][0]["token_ids"]
    assert 5 not in tokens
    assert np.all(np.asarray(tokens) < LLAMA.vocab_size)


def test_a_script_that_ends_while_a_step_runs_ends_cleanly(folder):
    script = f"""
import jaxinfer
engine = jaxinfer.init_inference({folder!r}, {{"data": 1}}, progress=False)
stream = engine.stream("the", jaxinfer.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
next(stream)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_convert_and_verify(run, folder, greedy, tmp_path):
    store = tmp_path / "store"
    code, out, err = run("convert", folder, store)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{store}: \d+ tensors, [\d,]+ bytes\n", out)
    assert run(*generate_arguments(store, PROMPT)) == (0, greedy[1] + "\n", "")
    code, out, err = run("verify", store, "--json")
    assert (code, err, json.loads(out)["good"]) == (0, "", True)

    code, out, err = run("convert", folder, store)
    assert (code, out) == (2, "")
    assert "expected a place where nothing is yet, got a store" in one_line(err)

    file = max((store / "weights" / "layers.0").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, err = run("verify", store)
    assert (code, err) == (2, "")
    assert re.search(r"1 faults .*\n.*weights/layers\.0: tensor layers\.0\..*damaged: expected crc32c", out)
    code, out, err = run(*generate_arguments(store, PROMPT))
    assert (code, out) == (2, "")
    assert "damaged" in one_line(err)


def test_convert_says_what_it_wrote_as_json(run, folder, tmp_path):
    code, out, _ = run("convert", folder, tmp_path / "store", "--dtype", "bfloat16", "--json", "--no-progress")
    found = json.loads(out)
    assert (code, found["store"]) == (0, str(tmp_path / "store"))
    assert found["bytes"] == sum(path.nbytes for path in _stored(tmp_path / "store"))


def _stored(store):
    from jaxinfer.checkpoints import Store

    with Store(store) as opened:
        return list(opened.tensors.values())
