"""``topt-vllm calibrate``: makes the threshold table of a model."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topt_vllm.calibration.command import default_output, serve_command
from topt_vllm.calibration.options import BUDGETS, CalibrationOptions
from topt_vllm.cli import UserError
from topt_vllm.replay.options import DTYPES, ReplayError

if TYPE_CHECKING:
    from topt_vllm.calibration.calibrate import Plan

_DESCRIPTION = """Runs the model over a few texts and writes the threshold table that
`vllm serve --attention-backend TOPTHETA` needs. The last part of the text, one sequence, is held back and only used
to measure the thresholds."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "calibrate", help="make the threshold table of a model", description=_DESCRIPTION
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a decoder-only model")
    add(
        "--dataset",
        required=True,
        nargs="+",
        metavar="TEXT",
        help='text files, JSONL files (key "text"), or hub datasets as name[:config[:split]]',
    )
    add("--num-samples", type=int, default=4, help="sequences to calibrate on (default %(default)s)")
    add(
        "--max-seq-length", type=int, help="tokens of a sequence (default: the model's context, at most 8192)"
    )
    _add_budgets(parser.add_argument_group("budgets").add_argument)
    _add_thresholds(parser.add_argument_group("thresholds").add_argument)
    _add_run(parser.add_argument_group("run and output").add_argument)
    return parser


def _add_budgets(add: Callable[..., Any]) -> None:
    add(
        "--budget",
        choices=BUDGETS,
        default="k",
        help="k: the same number of keys everywhere; mass: a share of dropped probability; auto: those of --k, and "
        "one for each target, with more keys for the heads that lose more (default %(default)s)",
    )
    add(
        "--k",
        type=int,
        nargs="+",
        default=[64, 128, 256],
        help="budgets: keys per query head (default 64 128 256)",
    )
    add("--mass", type=_percent, nargs="+", default=[5.0], help="budgets of --budget mass (default 5%%)")
    add(
        "--max-loss",
        type=_percent,
        nargs="+",
        default=[],
        help="targets of --budget auto: rise of perplexity, as 1%%",
    )
    add(
        "--target-rows",
        type=_percent,
        nargs="+",
        default=[],
        help="likewise: V rows read, all layers counted",
    )
    add("--dense-layers", type=int, nargs="*", metavar="LAYER", help="layers to attend densely (default 0)")


def _add_thresholds(add: Callable[..., Any]) -> None:
    add("--sigma", type=float, default=0.0, help="standard deviations added to θ (default %(default)s)")
    add(
        "--topk-at-calibration",
        action="store_true",
        help="run the model with top-k attention (the largest --k), as sparse layers will feed later ones; slow",
    )
    add("--seed", type=int, default=0, help="of the choice of query rows (default %(default)s)")


def _add_run(add: Callable[..., Any]) -> None:
    add("--device", help="cpu, cuda, cuda:N, or auto for all GPUs (default: a GPU where there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    add("--output", type=Path, help="table to write (default: toptheta.yaml in the model's folder)")
    add("--force", action="store_true", help="replace an existing table")
    add("--resume", action="store_true", help="go on where a killed run with the same options was")
    add("--dry-run", action="store_true", help="check everything, print what would be run, load no weights")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the table and prints what it is worth."""
    try:
        options = _options(args)
        _run(options, args.dry_run)
    except (ReplayError, OSError) as error:
        raise UserError(str(error)) from error
    return 0


def _percent(text: str) -> float:
    """A number with or without a percent sign."""
    return float(text.removesuffix("%"))


def _options(args: argparse.Namespace) -> CalibrationOptions:
    return CalibrationOptions(
        model=args.model,
        dataset=tuple(args.dataset),
        output=args.output or default_output(args.model),
        num_samples=args.num_samples,
        max_seq_length=args.max_seq_length,
        ks=tuple(sorted(args.k)),
        budget=args.budget,
        masses=tuple(sorted(args.mass, reverse=True)),
        max_loss=tuple(args.max_loss),
        target_rows=tuple(args.target_rows),
        dense_layers=None if args.dense_layers is None else tuple(args.dense_layers),
        sigma=args.sigma,
        topk_at_calibration=args.topk_at_calibration,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        force=args.force,
        resume=args.resume,
    )


def _run(options: CalibrationOptions, dry_run: bool) -> None:
    from topt_vllm.calibration.calibrate import calibrate, prepare
    from topt_vllm.calibration.summary import describe
    from topt_vllm.thresholds import dump

    plan = prepare(options)
    if dry_run:
        print(_resolved(plan))
        return
    table = calibrate(plan)
    dump(table, options.output, options.force)
    print(describe(table))
    default = table.budgets[-1].key
    print(f"\nwrote {options.output}\nserve it with\n\n  {serve_command(options.model, options.output)}\n")
    if len(table.budgets) > 1:
        print(f'The server uses k={default} unless "toptheta" in --additional-config names another "k".')


def _work(plan: "Plan") -> str:
    """What takes the time, so that it can be judged before it is spent."""
    from topt_vllm.calibration.budgets import MEASURED_ROWS
    from topt_vllm.calibration.search import MAX_RUNS
    from topt_vllm.calibration.sensitivity import SENSITIVITY_ROWS, SENSITIVITY_RUNS

    options, passes = plan.options, plan.options.num_samples + 1
    if options.budget != "k":
        passes += len(plan.error_sequences)
    if options.budget != "auto":
        return f"{passes} passes"
    tuning, layers = len(plan.sequences.tuning), len(plan.allocated_layers)
    return (
        f"{passes + tuning + 1} passes, at most {SENSITIVITY_RUNS} runs of the last {SENSITIVITY_ROWS} rows for "
        f"each of {layers} layers, at most {MAX_RUNS * tuning} runs of {MEASURED_ROWS} rows for each target"
    )


def _resolved(plan: "Plan") -> str:
    options, subject = plan.options, plan.subject
    lines = {
        "model": f"{options.model} ({subject.identity.architecture})",
        "fingerprint": subject.identity.fingerprint,
        "layers": f"{len(subject.full_layers)} with thresholds of {subject.identity.num_layers}",
        "dataset": ", ".join(source.name for source in plan.sources),
        "sequences": f"{options.num_samples} and 1 held back, of {plan.max_seq_length} tokens",
        "lengths": ", ".join(map(str, plan.lengths)),
        "k": ", ".join(map(str, options.ks)),
        "budgets": ", ".join([options.budget, *(target.name for target in options.targets)]),
        "dense layers": ", ".join(map(str, plan.dense_layers)) or "none",
        "sigma": options.sigma,
        "work": _work(plan),
        "attention": f"top {options.ks[-1]} keys" if options.topk_at_calibration else "dense",
        "seed": options.seed,
        "device": options.device or "a GPU where there is one",
        "dtype": options.dtype,
        "output": f"{options.output}{' (replaced)' if options.output.exists() else ''}",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())
