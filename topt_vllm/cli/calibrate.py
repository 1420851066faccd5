"""``topt-vllm calibrate``: makes the threshold table of a model."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from topt_vllm.calibration.options import CalibrationOptions
from topt_vllm.cli.options import add_options, read_options
from topt_vllm.table.command import default_output, serve_command

if TYPE_CHECKING:
    from topt_vllm.calibration.calibrate import Plan
    from topt_vllm.calibration.k_screen import ScreenPlan

_DESCRIPTION = """Runs the model over a few texts and writes the threshold table that
`vllm serve --attention-backend TOPTHETA` needs. The last part of the text, one sequence, is held back and only used
to measure the thresholds."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "calibrate", help="make the threshold table of a model", description=_DESCRIPTION
    )
    groups = add_options(parser, CalibrationOptions)
    groups["run and output"].add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be run, load no weights"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the table and prints what it is worth."""
    output = args.output or default_output(args.model)
    options = read_options(CalibrationOptions, args, output=output)
    (_add_to_table if options.k_screen_only else _run)(options, args.dry_run)
    return 0


def _run(options: CalibrationOptions, dry_run: bool) -> None:
    from topt_vllm.calibration.calibrate import calibrate, prepare
    from topt_vllm.calibration.summary import describe
    from topt_vllm.table.file import dump

    plan = prepare(options)
    change = plan.subject.rotations_change
    if change is not None and plan.max_seq_length <= change:
        print(
            f"note: this model turns K in other ways in sequences of more than {change} tokens (longrope), and a "
            "server with a longer --max-model-len does so for every token; calibrate longer ones for it",
            file=sys.stderr,
        )
    if dry_run:
        print(_resolved(plan))
        return
    table = calibrate(plan, lambda table: dump(table, options.output, options.force))
    print(describe(table))
    if idle := [
        str(budget.key) for budget in table.budgets if len(budget.dense_layers) == len(budget.layers)
    ]:
        print(
            f"warning: nothing is skipped with budget {', '.join(idle)}: all layers with full attention are dense. "
            "Layer 0 is by default; --dense-layers without a number means none",
            file=sys.stderr,
        )
    default = table.budgets[-1].key
    print(f"\nwrote {options.output}\nserve it with\n\n  {serve_command(options.model, options.output)}\n")
    if len(table.budgets) > 1:
        print(
            f'The server uses budget {default} unless "toptheta" in --additional-config names another "budget".'
        )


def _add_to_table(options: CalibrationOptions, dry_run: bool) -> None:
    from topt_vllm.calibration.k_screen import add_key_statistics, prepare
    from topt_vllm.calibration.summary import describe_screen
    from topt_vllm.table.file import dump

    plan = prepare(options)
    if dry_run:
        print(_resolved_screen(plan))
        return
    table = add_key_statistics(plan)
    dump(table, options.output, force=True)
    print("\n".join(describe_screen(table)))
    print(f"\nwrote {options.output}; its thresholds are what they were")


def _work(plan: "Plan") -> str:
    """What takes the time, so that it can be judged before it is spent."""
    from topt_vllm.calibration.plan import MEASURED_ROWS
    from topt_vllm.calibration.search import MAX_RUNS
    from topt_vllm.calibration.sensitivity import SENSITIVITY_ROWS, SENSITIVITY_RUNS

    passes = plan.options.num_samples + 1
    if plan.options.budget != "auto":
        return f"{passes} passes"
    tuning, layers = len(plan.sequences.tuning), len(plan.allocated_layers)
    stateful = plan.subject.stateful
    scanned, tried = (
        ("whole sequences", "whole sequences")
        if stateful
        else (f"the last {SENSITIVITY_ROWS} rows", f"{MEASURED_ROWS} rows")
    )
    return (
        f"{passes + tuning + 1} passes, at most {SENSITIVITY_RUNS} runs of {scanned} for each of {layers} layers, "
        f"at most {MAX_RUNS * tuning} runs of {tried} for each target"
        + (" (layers that keep a state can't be decoded behind kept K and V)" if stateful else "")
    )


def _resolved(plan: "Plan") -> str:
    from topt_vllm.replay.texts import counted
    from topt_vllm.table.words import layers_in_words

    options, subject = plan.options, plan.subject
    sequences = counted(options.num_samples, len(plan.sequences.tuning))
    lines = {
        "model": f"{options.model} ({subject.identity.architecture})",
        "fingerprint": subject.identity.fingerprint,
        "layers": f"{len(subject.full_layers)} with thresholds of {subject.identity.num_layers}",
        "dataset": ", ".join(source.name for source in plan.sources),
        "sequences": f"{sequences}, of {plan.max_seq_length} tokens",
        "lengths": ", ".join(map(str, plan.lengths)),
        "k": ", ".join(map(str, options.ks)),
        "budgets": ", ".join([options.budget, *(target.name for target in options.targets)]),
        "dense layers": layers_in_words(plan.dense_layers),
        "work": _work(plan),
        "seed": options.seed,
        "device": options.device or "a GPU where there is one",
        "dtype": options.dtype,
        "output": f"{options.output}{' (replaced)' if options.output.exists() else ''}",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())


def _resolved_screen(plan: "ScreenPlan") -> str:
    options, sequences = plan.options, plan.sequences
    lines = {
        "model": f"{options.model} ({plan.subject.identity.architecture})",
        "table": f"{options.output}, budgets {', '.join(str(budget.key) for budget in plan.table.budgets)}",
        "dataset": ", ".join(options.dataset),
        "sequences": f"{len(sequences.calibration)} and 1 held back, of {len(sequences.held_back)} tokens",
        "work": f"{len(sequences.calibration) + 1} passes",
        "device": options.device or "a GPU where there is one",
        "dtype": options.dtype,
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())
