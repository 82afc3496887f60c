"""The table of figures for one GPU: each beside its limit and a torch peer, measured one after the other.

    python benchmarks/table.py --list
    python benchmarks/table.py --rows decode,prefill --budget 240 --out table.json
    python benchmarks/table.py --rows all --rehearse            # everything, tiny, on a CPU

Weights are drawn on the device. jaxinfer and torch run in processes of their own, which write after every row, so what
was measured stays when a row fails or time runs out. ``--profile`` adds the kernels of decode steps, and of prompts
where a row has them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# Seconds of a row on one H200, compilation included; estimates, by which rows are left out when time is short.
SECONDS = {
    "ours": {
        "start": 25, "decode1": 20, "decode1_xla": 20, "decode16": 25, "decode64": 45, "int8": 20, "int4": 20,
        "fp8": 20, "long64": 20, "long64_xla": 25, "prefill": 25, "requests": 90, "opt1": 20, "opt16": 20, "gpt2xl": 25,
    },
    "peer": {
        "start": 15, "decode1": 45, "decode16": 30, "decode64": 30, "int8": 45, "int4": 35, "long64": 30, "prefill": 25,
        "opt1": 20, "opt16": 15, "gpt2xl": 15,
    },
}  # fmt: skip
PROFILE = 12
"""Seconds that a trace adds to a row."""
GROUPS = {
    "decode": ["decode1", "decode16", "decode64"],
    "quantized": ["int8", "int4", "fp8"],
    "latency": ["opt1", "opt16", "gpt2xl"],
    "all": [row for row in SECONDS["ours"] if row != "start"],
}


def part(kind: str, rows: list[str], ends: float, out: Path, args: argparse.Namespace) -> None:
    """Measure rows in this process and write them one by one."""
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parent))
    found: dict[str, Any] = {"rows": {}}

    def keep() -> None:
        temporary = out.with_suffix(".new")
        temporary.write_text(json.dumps(found))
        temporary.replace(out)

    begin = time.time()
    if kind == "ours":
        import table_ours as module

        given = (option.partition("=") for option in args.option)
        options = {name: int(value) if value.isdecimal() else value for name, _, value in given}
        ctx: Any = module.Context(args.rehearse, out.parent, args.profile, options, args.slots)
    else:
        import table_peer as module  # type: ignore[no-redef]

        ctx = module.Context(args.rehearse, out.parent, args.compiled_peer)
    found |= module.start(ctx)
    found["start_s"] = time.time() - begin
    keep()
    for row in rows:
        needed = 0 if args.rehearse else SECONDS[kind][row] + (PROFILE if args.profile and kind == "ours" else 0)
        if time.time() + needed > ends:
            found["rows"][row] = {"skipped": f"about {needed} s, and {ends - time.time():.0f} s are left"}
        else:
            begin = time.time()
            try:
                found["rows"][row] = module.ROWS[row](ctx)
            except Exception as error:  # one row must not take the others with it
                text = " ".join(str(error).split())[:1500]
                found["rows"][row] = {
                    "error": f"{type(error).__name__}: {text}", "trace_back": traceback.format_exc()[-3000:],
                }  # fmt: skip
            found["rows"][row]["row_s"] = time.time() - begin
        keep()
        print(f"{kind} {row}: {brief(found['rows'][row])}", flush=True)


def brief(row: dict[str, Any]) -> str:
    """One line of a row."""
    if "value" not in row:
        return str(row.get("skipped") or row.get("error"))
    limit = f", limit {row['limit']:.4g} ({row['share']:.1%})" if "limit" in row else ""
    return f"{row['value']:.4g} {row['unit']}{limit}; took {row.get('row_s', 0):.1f} s"


def run(kind: str, rows: list[str], seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """Measure rows in a process of their own, at most for so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, str(HERE / "table.py"), "--part", kind, "--rows", ",".join(rows), "--out", str(out)]
        command += ["--ends", str(time.time() + seconds), "--slots", str(args.slots)]
        command += [f"--option={option}" for option in args.option]
        flags = {"--rehearse": args.rehearse, "--profile": args.profile, "--compiled-peer": args.compiled_peer}
        command += [flag for flag, on in flags.items() if on]
        # A GPU's memory is taken at the start: what is not taken, the plan cannot give to the cache.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | dict(os.environ)
        if args.rehearse:
            environment["JAX_PLATFORMS"] = "cpu"
        log, begin = Path(folder) / "stderr", time.time()
        with log.open("w") as errors, subprocess.Popen(command, env=environment, stderr=errors) as process:
            try:
                code: int | str = process.wait(seconds + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                code = f"stopped after {seconds:.0f} s"
        found = json.loads(out.read_text()) if out.exists() else {"rows": {}}
        if code != 0:
            found["exit"], found["stderr"] = code, log.read_text(errors="replace")[-4000:]
            print(f"{kind}: exit {code}\n{found['stderr'][-1500:]}", flush=True)
        for row in rows:
            found["rows"].setdefault(row, {"error": f"not measured: the process ended ({code})"})
        found["seconds"] = time.time() - begin
    return found


def chosen(text: str) -> list[str]:
    """The rows of a list of names of rows and groups."""
    rows = [row for name in text.split(",") for row in GROUPS.get(name, [name])]
    unknown = set(rows) - set(GROUPS["all"])
    if unknown:
        raise SystemExit(f"no row {', '.join(sorted(unknown))}; there are {', '.join([*GROUPS, *GROUPS['all']])}")
    return list(dict.fromkeys(rows))


def main() -> None:
    """Run the parts and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help="names of rows and groups, with commas")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("table.json"))
    parser.add_argument("--no-peer", action="store_true", help="jaxinfer alone")
    parser.add_argument("--no-ours", action="store_true", help="the peer alone")
    parser.add_argument("--profile", action="store_true", help="trace the kernels of steps")
    parser.add_argument("--compiled-peer", action="store_true", help="static cache and compilation in transformers")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--slots", type=int, default=256, help="slots of the row `requests`")
    parser.add_argument("--option", action="append", default=[], help="name=value, further arguments of init_inference")
    parser.add_argument("--list", action="store_true", help="show the rows and the seconds they may take")
    parser.add_argument("--part", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = chosen(args.rows)
    if args.list:
        for row in rows:
            print(f"{row:12} ours {SECONDS['ours'][row]:3} s   peer {SECONDS['peer'].get(row, '-'):>3} s")
        sums = {kind: sum(seconds.get(row, 0) for row in rows) + seconds["start"] for kind, seconds in SECONDS.items()}
        return print(f"sum, start included: ours {sums['ours']} s, peer {sums['peer']} s")
    if args.part:
        return part(args.part, rows, args.ends, args.out, args)
    ends = time.time() + args.budget
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/table.py", *sys.argv[1:]]), "rehearsal": args.rehearse, "rows": {},
    }  # fmt: skip
    with_peer = [] if args.no_peer else [row for row in rows if row in SECONDS["peer"]]
    peers = SECONDS["peer"]["start"] + sum(SECONDS["peer"][row] for row in with_peer) if with_peer else 0
    for kind, wanted, kept in (("ours", [] if args.no_ours else rows, peers), ("peer", with_peer, 0)):
        if not wanted:
            continue
        # Peers get what they are thought to need; what the first part leaves over is theirs too.
        left = ends - time.time()
        found = run(kind, wanted, max(left - kept, left / 2) if kept else left, args)
        for row, figures in found.pop("rows").items():
            results["rows"].setdefault(row, {})[kind] = figures
        results[kind] = found
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    for row, figures in results["rows"].items():
        print(f"{row}: " + " | ".join(f"{kind} {brief(figures[kind])}" for kind in figures))


if __name__ == "__main__":
    main()
