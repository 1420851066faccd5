"""``topt-vllm bench formats``: what storing K and V in one byte an element costs, on a captured cache."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topt_vllm.cli.bench_output import provenance, write_json

_FORMATS = """Stores the K and V of a capture (`topt-vllm bench capture`) as fp8 and as posits of 8 bits, without
scales, and prints relative errors: root mean squares over all layers, of K, of V and of the last token's dense
attention. "cut off" rounds towards zero, as vLLM's CPU cache writer does."""


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("formats", help="errors of 8-bit caches", description=_FORMATS)
    add = parser.add_argument
    add("--cache", type=Path, required=True, metavar="FILE", help="a capture")
    add("--json", type=Path, metavar="FILE", help="write one record per format; the file must not exist")
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace) -> int:
    from topt_vllm.benchmarks.cache_file import load
    from topt_vllm.benchmarks.formats import format_errors

    captured = load(args.cache)
    origin = provenance()
    found = format_errors(captured)
    print(
        f"{captured.identity.id}, {captured.seq_len} tokens of {captured.text}, {len(captured.layers)} layers"
    )
    print(f"{'format':18s} {'K':>8} {'V':>8} {'output':>8}")
    for row in found:
        print(f"{row.name:18s} {row.key:8.2%} {row.value:8.2%} {row.output:8.2%}")
    write_json(args.json, [{**asdict(row), "provenance": origin} for row in found])
    return 0
