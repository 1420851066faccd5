"""``topt-vllm bench traffic``: predicted times of the Triton kernel on GPUs that need not be here."""

import argparse
from pathlib import Path
from typing import Any

from topt_vllm.cli import UserError
from topt_vllm.cli.bench_output import write_json

_TRAFFIC = """Predicts from the bytes that a decode call moves how long it takes at the peak bandwidth of some
GPUs, beside dense attention: 32 query heads, 8 KV heads, D=128, bf16. Nothing is measured, and no kernel attains
the peak."""


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("traffic", help="predicted times on GPUs", description=_TRAFFIC)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 16, 64], help="sequences (default 1 16 64)")
    add("--seq-lens", type=int, nargs="+", default=[8192, 32768, 131072], help="context lengths")
    add("--keep", type=float, default=0.1, help="share of V rows read (default %(default)s)")
    add(
        "--candidates",
        type=float,
        help="with a K screen, the share of keys that it lets through (default: no screen)",
    )
    add("--block-size", type=int, default=64, help="tokens of a KV block (default %(default)s)")
    add(
        "--json", type=Path, metavar="FILE", help="write one record per GPU and case; the file must not exist"
    )
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace) -> int:
    from topt_vllm.benchmarks.traffic import predictions

    if not 0 < args.keep <= 1:
        raise UserError(f"--keep {args.keep}: a share lies above 0 and up to 1")
    if args.candidates is not None and not args.keep <= args.candidates <= 1:
        raise UserError(
            f"--candidates {args.candidates}: they hold what is kept, so a share from --keep up to 1"
        )
    records = predictions(args.batch, args.seq_lens, args.keep, args.block_size, args.candidates)
    print("GPU         B       n     MB  dense MB   us at peak  dense us  dense / ours   (predicted)")
    for r in records:
        print(
            f"{r['gpu']:9s} {r['batch']:3d} {r['seq_len']:7d} {r['bytes'] / 1e6:6.0f} {r['bytes_dense'] / 1e6:9.0f}"
            f" {r['us']:12.1f} {r['us_dense']:9.1f} {r['ratio']:13.2f}"
        )
    write_json(args.json, records)
    return 0
