"""``topt-vllm bench autotune``: launch parameters of the Triton kernel, searched on a GPU."""

import argparse
from pathlib import Path
from typing import Any

from topt_vllm.cli.bench_output import provenance, refuse_interpreter, write_json
from topt_vllm.cli.options import check_least
from topt_vllm.errors import UserError
from topt_vllm.shares import read_part

_AUTOTUNE = """Times tiles, stages and programs of the Triton decode kernel for a shape on a GPU, each checked
against a float64 oracle first. Code that spills or doesn't fit is left out. The best is printed beside the
heuristic's choice; to use it, change attention/triton/launch.py and check with `topt-vllm bench compile`."""


_SIZES = {"batch": 16, "seq-len": 32768, "heads": 32, "kv-heads": 8, "head-dim": 128, "block-size": 64}


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("autotune", help="launch parameters on a GPU", description=_AUTOTUNE)
    add = parser.add_argument
    for name, default in _SIZES.items():
        add(f"--{name}", type=int, default=default, help="default %(default)s")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default %(default)s")
    add("--keep", type=read_part, default=0.1, metavar="SHARE", help="of V rows (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write one record per candidate; the file must not exist")
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace) -> int:
    check_least(args, dict.fromkeys((name.replace("-", "_") for name in _SIZES), 1))
    if args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    import torch

    from topt_vllm.attention.common import Selection
    from topt_vllm.benchmarks.cases import Shape, thetas_for
    from topt_vllm.benchmarks.cuda import find_gpu

    gpu = find_gpu()
    refuse_interpreter()
    from topt_vllm.benchmarks.autotune import chip_of, compiled_for, tune
    from topt_vllm.benchmarks.device_cases import device_inputs

    chip = chip_of(gpu.device)
    dims = (args.heads, args.kv_heads, args.head_dim, args.block_size)
    shape = Shape((args.seq_len,) * args.batch, *dims, getattr(torch, args.dtype))
    inputs, selection, origin = device_inputs(shape, gpu.device), Selection(), provenance()
    thetas = thetas_for(inputs, args.keep, selection)
    records = tune(inputs, thetas, selection, gpu, chip, compiled_for(chip))
    timed = [record for record in records if record["ms"] is not None]
    print(f"{len(timed)} of {len(records)} candidates timed")
    best = min(timed, key=lambda record: record["ms"], default=records[0])
    for title, record in (("heuristic", records[0]), ("best", best)):
        fields = " ".join(f"{key}={value}" for key, value in record.items())
        print(f"{title:10s} {fields}")
    write_json(args.json, [{**record, "provenance": origin} for record in records])
    return 0
