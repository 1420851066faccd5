"""``topt-vllm bench``: decode calls against the platform's kernel."""

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
_DTYPES = ("bfloat16", "float16", "float32")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command and its modes."""
    parser = subparsers.add_parser("bench", help="measure against the platform's backend")
    modes = parser.add_subparsers(title="modes", required=True, metavar="MODE", dest="mode")
    _add_decode(modes)
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


def run(args: argparse.Namespace) -> int:
    """Runs one mode and returns its exit status."""
    return args.bench(args)


def _run_decode(args: argparse.Namespace) -> int:
    import torch

    from topt_vllm.attention.common import Policy
    from topt_vllm.benchmarks.cases import Shape
    from topt_vllm.benchmarks.decode import bench_case, machine

    if args.json and args.json.exists():
        raise UserError(f"{args.json} exists; name another file")
    if args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    if not all(0 < keep <= 1 for keep in args.keep):
        raise UserError(f"--keep {args.keep}: shares lie above 0 and up to 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = Policy(group_keep=args.group_keep, compensation=args.compensation)
    provenance = {**machine(), "topt_vllm": __version__, "commit": _commit(), "command": shlex.join(sys.argv)}
    print(", ".join(f"{key} {value}" for key, value in provenance.items()))
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


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="topt-vllm")
    add_parser(_parser.add_subparsers(required=True))
    _args = _parser.parse_args(["bench", *sys.argv[1:]])
    sys.exit(run(_args))
