"""``topt-vllm bench compile``: what the Triton kernels take on GPUs that need not be here."""

import argparse
from pathlib import Path
from typing import Any

from topt_vllm.cli.bench_output import provenance, refuse_interpreter, write_json
from topt_vllm.errors import UserError

_COMPILE = """Compiles the Triton kernels for GPUs that need not be here, and prints registers, spills, shared
memory and how many blocks a multiprocessor holds: the worst of each head dimension and kernel; --json has every
record. Everything takes half an hour; options narrow it. The exit status is 1 if anything spills."""
_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
_HEAD_DIMS = (64, 80, 128, 192, 256, 512)
# (kernel, whether for a K screen): a line of each. Merge kernels hardly differ with one.
_LINES = (
    ("decode", False),
    ("decode", True),
    ("merge", False),
    ("finish", False),
    ("queries", True),
    ("codes", True),
)
_DTYPES = ("bfloat16", "float16", "fp8_e4m3", "fp8_e5m2")


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("compile", help="registers, spills and occupancy on GPUs", description=_COMPILE)
    add = parser.add_argument
    add("--targets", nargs="+", choices=_TARGETS, default=_TARGETS, help="default: all")
    add("--head-dims", type=int, nargs="+", choices=_HEAD_DIMS, default=_HEAD_DIMS, help="default: all")
    add("--dtypes", nargs="+", choices=_DTYPES, default=_DTYPES, help="of the cache; default: all")
    add("--json", type=Path, metavar="FILE", help="write one record per configuration and target")
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace) -> int:
    refuse_interpreter()
    try:
        from topt_vllm.benchmarks.compile import compile_all, shipped
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; install Triton: pip install 'triton>=3.6'") from error

    origin = provenance()
    records: list[dict[str, Any]] = []
    print("target   kernel          head dim  configurations  registers  spills  shared bytes  blocks")
    for target in args.targets:
        for head_dim in args.head_dims:
            found = list(compile_all(shipped([head_dim], args.dtypes), [target]))
            for kernel, screen in _LINES:
                same = [each for each in found if each["kernel"] == kernel and each["screen"] == screen]
                print(_line(same), flush=True)
            records += found
    write_json(args.json, [{**record, "provenance": origin} for record in records])
    spilling = [record for record in records if record["spills"]]
    for record in spilling:
        print(f"spills: {record['target']} {record['kernel']} {record['config']}: {record['spills']}")
    return 1 if spilling else 0


def _line(records: list[dict[str, Any]]) -> str:
    """The worst of each number."""
    first = records[0]
    name = first["kernel"] + (", K screen" if first["screen"] else "")
    most = {key: max(record[key] for record in records) for key in ("registers", "spills", "shared_bytes")}
    return (
        f"{first['target']:8s} {name:16s}{first['head_dim']:9d} {len(records):15d}"
        f" {most['registers']:10d} {most['spills']:7d} {most['shared_bytes']:13d}"
        f" {min(record['occupancy'] for record in records):7d}"
    )
