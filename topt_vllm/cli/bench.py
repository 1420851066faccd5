"""``topt-vllm bench``: decode calls, and the whole engine, against the platform's."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from topt_vllm.cli import UserError
from topt_vllm.version import __version__

_DECODE = """Times one decode call of our kernel and of the platform's dense kernel in turns, on the same cache in
the same process, after checking both against a float64 oracle. The synthetic survivors are scattered at random,
which is hostile to gathering: those of real models cluster."""
_SERVE = """Serves the model with the platform's backend and with TOPTHETA in turns, sends both the same long
prompts through the OpenAI API, and compares the time in which all requests decode. Prefix caching is off."""
_DTYPES = ("bfloat16", "float16", "float32")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command and its modes."""
    parser = subparsers.add_parser("bench", help="measure against the platform's backend")
    modes = parser.add_subparsers(title="modes", required=True, metavar="MODE", dest="mode")
    _add_decode(modes)
    _add_serve(modes)
    return parser


def _add_decode(modes: Any) -> None:
    parser = modes.add_parser("decode", help="one decode call", description=_DECODE)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8], help="sequences (default 1 8)")
    add("--seq-lens", type=int, nargs="+", default=[2048, 8192, 32768], help="context lengths")
    add("--heads", type=int, default=32, help="query heads (default %(default)s)")
    add("--kv-heads", type=int, default=8, help="KV heads (default %(default)s)")
    add("--head-dim", type=int, default=128, help="head dimension (default %(default)s)")
    add("--block-size", type=int, default=128, help="tokens of a KV block (default %(default)s)")
    add("--dtype", choices=_DTYPES, default="bfloat16", help="of query and cache (default %(default)s)")
    add(
        "--keep",
        type=float,
        nargs="+",
        default=[1.0, 0.3, 0.1, 0.03],
        help="target shares of V rows, counted once per KV head (default 1.0 0.3 0.1 0.03)",
    )
    add("--group-keep", choices=("head", "union"), default="union", help="default %(default)s")
    add("--compensation", choices=("none", "vmean"), default="vmean", help="default %(default)s")
    add("--seconds", type=float, default=3.0, help="time for each shape (default %(default)s)")
    add("--threads", type=int, help="torch threads (default: torch's)")
    add("--json", type=Path, metavar="FILE", help="write one record per case; the file must not exist")
    parser.set_defaults(bench=_run_decode)


def _add_serve(modes: Any) -> None:
    parser = modes.add_parser("serve", help="the whole engine", description=_SERVE)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add("--dataset", type=Path, nargs="+", required=True, metavar="TEXT", help="text files for the prompts")
    add("--concurrency", type=int, default=8, help="requests sent at once (default %(default)s)")
    add("--prompt-tokens", type=int, default=7000, help="of each prompt (default %(default)s)")
    add("--max-tokens", type=int, default=128, help="of each answer (default %(default)s)")
    add("--rounds", type=int, default=1, help="how often both are served (default %(default)s)")
    add("--toptheta", type=json.loads, default={}, metavar="JSON", help="settings, as in --additional-config")
    add("--json", type=Path, metavar="FILE", help="write the result; the file must not exist")
    parser.set_defaults(bench=_run_serve)


def run(args: argparse.Namespace) -> int:
    """Runs one mode and returns its exit status."""
    return args.bench(args)


def _run_decode(args: argparse.Namespace) -> int:
    import torch

    from topt_vllm.attention.common import Policy
    from topt_vllm.benchmarks.cases import Shape
    from topt_vllm.benchmarks.decode import bench_case

    _refuse_existing(args.json)
    if args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    if not all(0 < keep <= 1 for keep in args.keep):
        raise UserError(f"--keep {args.keep}: shares lie above 0 and up to 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = Policy(group_keep=args.group_keep, compensation=args.compensation)
    provenance = _provenance()
    print(_HEADER)
    records = []
    for batch in args.batch:
        for seq_len in args.seq_lens:
            shape = Shape(
                batch,
                seq_len,
                args.heads,
                args.kv_heads,
                args.head_dim,
                args.block_size,
                getattr(torch, args.dtype),
            )
            for record in bench_case(shape, args.keep, policy, args.seconds):
                print(_line(record), flush=True)
                records.append({**record, "provenance": provenance})
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def _run_serve(args: argparse.Namespace) -> int:
    from topt_vllm.benchmarks.serve import ServeBenchmark
    from topt_vllm.benchmarks.server import ServerError

    _refuse_existing(args.json)
    missing = [path for path in args.dataset if not path.is_file()]
    if missing:
        raise UserError(f"--dataset {missing[0]} is no file")
    provenance = _provenance()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.dataset)
    sizes = (args.concurrency, args.prompt_tokens, args.max_tokens, args.rounds)
    try:
        outcome = ServeBenchmark(args.model, text, *sizes, args.toptheta).run(
            lambda line: print(line, flush=True)
        )
    except (ValueError, ServerError) as error:
        raise UserError(str(error)) from error
    print("            tokens/s   ms between tokens   ms to first token   (medians)")
    for name in ("platform", "toptheta"):
        row = outcome[name]
        numbers = row["decode_tokens_per_second"], row["itl_ms_median"], row["ttft_ms_median"]
        print("{:10s} {:9.1f} {:19.1f} {:19.0f}".format(name, *numbers))
    print(f"decode throughput, toptheta / platform: {outcome['ratio_decode']:.2f}")
    if args.json:
        args.json.write_text(json.dumps({**outcome, "provenance": provenance}, indent=1) + "\n")
    return 0


def _refuse_existing(path: Path | None) -> None:
    if path and path.exists():
        raise UserError(f"{path} exists; name another file")


def _provenance() -> dict[str, Any]:
    """What the numbers depend on, also printed."""
    from topt_vllm.benchmarks.decode import machine

    found = {**machine(), "topt_vllm": __version__, "commit": _commit(), "command": shlex.join(sys.argv)}
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


_HEADER = (
    "   B       n   keep  V rows     ms (p20-p80)            CPU_ATTN ms (p20-p80)     × CPU_ATTN  × keep all"
    "      MB   GB/s  share  max error"
)


def _line(r: dict[str, Any]) -> str:
    """One row of the table."""
    ours = f"{r['ms']:8.3f} ({r['ms_p20']:.3f}-{r['ms_p80']:.3f})"
    stock, ratio = "-", "-"
    if r["ms_platform"]:
        stock = f"{r['ms_platform']:8.3f} ({r['ms_platform_p20']:.3f}-{r['ms_platform_p80']:.3f})"
        ratio = f"{r['ratio_platform']:.2f}"
    return (
        f"{r['batch']:4d} {r['seq_len']:7d} {r['keep_target']:6.2f} {r['v_rows_read']:7.2%} {ours:>25}"
        f" {stock:>28} {ratio:>10} {r['ratio_keep_all']:11.2f} {r['bytes_moved'] / 1e6:7.1f} {r['gbps']:6.1f}"
        f" {r['bandwidth_share']:6.1%} {r['max_error']:10.2e}"
    )


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
