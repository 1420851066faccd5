"""``topt-vllm bench decode``: one decode call, synthetic or over a captured cache."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topt_vllm import large_pages
from topt_vllm.attention.margin import DEFAULT_MARGIN, HARD, read_margin
from topt_vllm.benchmarks.lengths import parse_lengths
from topt_vllm.cli.bench_output import provenance, write_json
from topt_vllm.cli.options import check_least
from topt_vllm.errors import UserError
from topt_vllm.evaluation.options import SCREENS
from topt_vllm.replay.options import table_name
from topt_vllm.shares import read_part
from topt_vllm.table.words import budget_in_words

if TYPE_CHECKING:
    from topt_vllm.attention.common import Selection
    from topt_vllm.benchmarks.devices import Device
    from topt_vllm.benchmarks.screens import Screens

_DECODE = """Times one decode call of our kernel and of the platform's dense kernel in turns, on the same cache in
the same process, after checking both against a float64 oracle. Synthetic survivors are scattered at random, which
is hostile to gathering: those of real models cluster. With --cache the call goes over the sparse layers of a real
model's cache, made by `topt-vllm bench capture`, with the thresholds of a table.
With --k-screen a variant is checked against the reference operator with that screen; `loss` is the relative error
of the heads' outputs against dense attention.
On CPUs a call goes over copies of the case that no processor cache holds, as in a model of many layers; times are
those of one.
With --device cuda the rivals are vLLM's FlashAttention, FlashInfer and Triton kernels (the best one is the
platform), calls are captured in CUDA graphs, and the L2 cache is cold."""
_DTYPES = ("bfloat16", "float16", "float32")
_CACHE_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
# Options that describe a synthetic cache, with their defaults; a captured one has its own.
_SYNTHETIC: dict[str, Any] = {
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "cache_dtype": "auto",
    "keep": [1.0, 0.3, 0.1, 0.03],
}
_BATCH = [1, 8]
_SEQ_LENS = [2048, 8192, 32768]
# Tokens of a KV block where none are named; on GPUs those of TOPTHETA's cache.
_BLOCK_SIZE = {"cpu": 128, "cuda": 64}
# The smallest numbers that make sense.
_LEAST = dict.fromkeys(("batch", "seq_lens", "heads", "kv_heads", "head_dim", "block_size", "threads"), 1) | {
    "seconds": 0
}
# What sizes are multiples of, by device.
_MULTIPLES = {"cpu": {"head_dim": 16, "block_size": 16}, "cuda": {"head_dim": 8, "block_size": 16}}
# Options of a replay, which mean nothing without a captured cache.
_REPLAY = ("thresholds", "budget", "layers")


def add_mode(modes: Any) -> None:
    """Adds the mode and its options."""
    parser = modes.add_parser("decode", help="one decode call", description=_DECODE)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", help="sequences (default 1 8)")
    add("--block-size", type=int, help="tokens of a KV block (default 128; 64 with --device cuda)")
    add("--k-screen", nargs="+", choices=SCREENS, default=["off"], help="as in the settings (default off)")
    add(
        "--k-screen-margin",
        type=read_margin,
        default=argparse.SUPPRESS,
        metavar="MARGIN",
        help=f"as in the settings: standard deviations or {HARD} (default {DEFAULT_MARGIN})",
    )
    add("--group-keep", choices=("head", "union"), default="union", help="default %(default)s")
    add("--compensation", choices=("none", "vmean"), default="vmean", help="default %(default)s")
    add("--seconds", type=float, default=3.0, help="time for each shape (default %(default)s)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: NVIDIA or AMD, in graphs (default cpu)",
    )
    add("--threads", type=int, help="torch threads (default: torch's)")
    add("--json", type=Path, metavar="FILE", help="write one record per case; the file must not exist")
    _add_synthetic(parser.add_argument_group("a synthetic cache"))
    _add_replay(parser.add_argument_group("a captured cache"))
    parser.set_defaults(bench=_run)


def _add_synthetic(group: Any) -> None:
    add = group.add_argument
    add("--seq-lens", type=int, nargs="+", help="context lengths (default 2048 8192 32768)")
    add(
        "--ragged",
        type=parse_lengths,
        nargs="+",
        metavar="COUNTxLENGTH+…",
        help="batches of several context lengths instead, such as 1x131072+15x4096",
    )
    add("--heads", type=int, help="query heads (default 32)")
    add("--kv-heads", type=int, help="KV heads (default 8)")
    add("--head-dim", type=int, help="head dimension (default 128)")
    add("--dtype", choices=_DTYPES, help="of query and cache (default bfloat16)")
    add(
        "--cache-dtype",
        choices=("auto", *_CACHE_DTYPES),
        help="of the cache, as --kv-cache-dtype of vLLM without scales (default auto: --dtype)",
    )
    add(
        "--keep",
        type=read_part,
        metavar="SHARE",
        nargs="+",
        help="target shares of V rows, counted once per KV head (default 1.0 0.3 0.1 0.03)",
    )


def _add_replay(group: Any) -> None:
    add = group.add_argument
    add("--cache", type=Path, metavar="FILE", help="replay this capture")
    add(
        "--thresholds",
        type=table_name,
        metavar="TABLE",
        help="the model's table (default: the shipped one of its fingerprint)",
    )
    add(
        "--budget",
        "--k",
        type=_budget,
        nargs="+",
        metavar="BUDGET",
        help="budgets of the table, by k or name (default: its last; --k: its former name)",
    )
    add("--layers", type=int, nargs="+", metavar="LAYER", help="layers of a call (default: every sparse one)")


def _budget(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _run(args: argparse.Namespace) -> int:
    _check(args)
    large_pages.ask()
    import torch

    from topt_vllm.attention.common import Selection

    if args.threads:
        torch.set_num_threads(args.threads)
    selection = Selection(group_keep=args.group_keep, compensation=args.compensation)
    device = _device(args)
    cases = _replays(args, selection, device) if args.cache else _synthetic(args, selection, device)
    origin = provenance()
    print(_HEADER)
    records = []
    told: dict[str, str] = {}
    for dense, alike in groupby(cases, _dense):
        print(dense)
        for record in alike:
            print(_line(record), flush=True)
            if record["left_out"] != told:
                told = record["left_out"]
                print("".join(f"  without {name}: {reason}\n" for name, reason in told.items()), end="")
            records.append({**record, "provenance": origin})
    write_json(args.json, records)
    return 0


def _device(args: argparse.Namespace) -> "Device":
    """Where to measure."""
    from topt_vllm.attention.api import load_implementation
    from topt_vllm.benchmarks.devices import CPU

    if args.device == "cpu":
        load_implementation("cpu", "cpu")
        return CPU
    if args.cache_dtype not in (None, "auto"):
        raise UserError("--cache-dtype: with --device cuda, only auto is measured")
    if args.dtype == "float32":
        raise UserError(
            "--dtype float32: FlashAttention reads bfloat16 and float16, so those are allowed on cuda"
        )
    from topt_vllm.benchmarks.cuda import find_gpu

    return find_gpu()


def _check(args: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and fills in the defaults of a synthetic cache."""
    check_least(args, _LEAST)
    for name, size in _MULTIPLES[args.device].items():
        if (given := getattr(args, name)) is not None and given % size:
            raise UserError(f"--{name.replace('_', '-')} {given}: a multiple of {size} is needed")
    if "k_screen_margin" not in args:
        args.k_screen_margin = DEFAULT_MARGIN
    elif args.k_screen == ["off"]:
        raise UserError("--k-screen-margin is that of a K screen; name one with --k-screen, or leave it out")
    if args.k_screen_margin is not None and not 0 <= args.k_screen_margin < 100:
        raise UserError(f"--k-screen-margin {args.k_screen_margin}: at least 0 and below 100, or {HARD}")
    if args.block_size is None:
        args.block_size = _BLOCK_SIZE[args.device]
    if args.ragged and (args.batch or args.seq_lens):
        raise UserError("--ragged has counts and lengths of its own; leave out --batch and --seq-lens")
    if args.batch is None:
        args.batch = _BATCH
    for name in ("seq_lens", "ragged", *_SYNTHETIC) if args.cache else _REPLAY:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} describes a synthetic cache, and {args.cache} has its own: leave it out, or make "
                "another with `topt-vllm bench capture`"
                if args.cache
                else f"{option} is for replays; name a capture with --cache, or leave it out"
            )
    if args.cache:
        return
    for name, default in _SYNTHETIC.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.cache_dtype != "auto" and args.k_screen != ["off"]:
        raise UserError(
            f"--k-screen: bench decode has none for a K in {args.cache_dtype}; only off is allowed"
        )
    if args.k_screen != ["off"] and set(args.keep) == {1.0}:
        raise UserError(
            "--k-screen: where every row is kept there is nothing to screen; add a --keep below 1"
        )
    if args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")


def _screens(args: argparse.Namespace) -> "Screens":
    from topt_vllm.benchmarks.screens import Screens

    return Screens(args.k_screen, args.k_screen_margin)


def _synthetic(
    args: argparse.Namespace, selection: "Selection", device: "Device"
) -> Iterator[dict[str, Any]]:
    import torch

    from topt_vllm.benchmarks.cases import Shape
    from topt_vllm.benchmarks.decode import bench_case

    cache = getattr(torch, _CACHE_DTYPES[args.cache_dtype]) if args.cache_dtype in _CACHE_DTYPES else None
    grid = [(seq_len,) * batch for batch in args.batch for seq_len in args.seq_lens or _SEQ_LENS]
    dims = (args.heads, args.kv_heads, args.head_dim, args.block_size)
    for lengths in args.ragged or grid:
        shape = Shape(lengths, *dims, getattr(torch, args.dtype), cache)
        yield from bench_case(shape, args.keep, selection, args.seconds, _screens(args), device)


def _replays(args: argparse.Namespace, selection: "Selection", device: "Device") -> Iterable[dict[str, Any]]:
    from topt_vllm.benchmarks.cache_file import load
    from topt_vllm.benchmarks.replay import bench_replay
    from topt_vllm.config import TopThetaConfig
    from topt_vllm.table.search import find_table

    captured = load(args.cache)
    config = TopThetaConfig(thresholds=args.thresholds)
    found = find_table(config, captured.identity, captured.identity.id, None)
    if found is None:
        raise UserError("a replay needs thresholds; name a table with --thresholds instead of none")
    table, path = found
    ks = args.budget or [table.budget(None).key]
    how = (selection, args.seconds, _screens(args), args.layers, args.block_size, device)
    cases = [bench_replay(captured, table, ks, batch, *how) for batch in args.batch]
    print(f"{captured.identity.id}, {captured.seq_len} tokens of {captured.text}, table {path}")
    return chain.from_iterable(cases)


_HEADER = (
    "   B       n    keep  screen   cand.  K rows  V rows     ms (p20-p80)            platform ms (p20-p80)"
    "     × platform  × keep all      MB   GB/s  share  max error    loss"
)


def _dense(r: dict[str, Any]) -> str:
    """What every row of V costs: each of the platform's kernels, the one that counts first, and ours."""
    ordered = sorted(r["rivals"].items(), key=lambda rival: rival[1])
    parts = [f"{name} {ms:.3f} ms" for name, ms in ordered]
    ours = f"ours {r['ms_keep_all']:.3f} ms"
    if ordered:
        parts[0] += " (the platform)"
        ours += f" ({ordered[0][1] / r['ms_keep_all']:.2f} × platform: what the kernel gives)"
    return f"{r['lengths']}, every row: {', '.join([*parts, ours])}"


def _line(r: dict[str, Any]) -> str:
    """One row of the table; × keep all is what skipping gives."""
    ours = f"{r['ms']:8.3f} ({r['ms_p20']:.3f}-{r['ms_p80']:.3f})"
    stock, ratio = "-", "-"
    if r["ms_platform"]:
        stock = f"{r['ms_platform']:8.3f} ({r['ms_platform_p20']:.3f}-{r['ms_platform_p80']:.3f})"
        ratio = f"{r['ratio_platform']:.2f}"
    keep = budget_in_words(r["k"]) if r["k"] else f"{r['keep_target']:.2f}"
    return (
        f"{r['batch']:4d} {r['seq_len']:7d} {keep:>7} {r['k_screen']:>7} {r['candidates']:7.2%}"
        f" {r['k_rows_read']:7.2%} {r['v_rows_read']:7.2%} {ours:>25} {stock:>28} {ratio:>10}"
        f" {r['ratio_keep_all']:11.2f}"
        f" {r['bytes_moved'] / 1e6:7.1f} {r['gbps']:6.1f} {r['bandwidth_share']:6.1%} {r['max_error']:10.2e}"
        f" {r['loss']:7.4f}"
    )
