"""``topt-vllm evaluate``: what rules that skip V rows cost, at equal rows read."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topt_vllm.cli import UserError
from topt_vllm.evaluation.options import ADAPTING, RULES, SIFT, EvaluationOptions
from topt_vllm.replay.options import DTYPES, ReplayError

if TYPE_CHECKING:
    from topt_vllm.evaluation.plan import Plan

_DESCRIPTION = """Decodes the last rows of texts behind a densely attended prompt, as a server does, under rules
that skip V rows, and compares them with dense attention: perplexity, divergence, agreement, and with --needles
the retrieval of hidden facts. Each rule has one parameter, tuned so that the rules read equally many V rows."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "evaluate", help="measure what skipping costs, beside other rules", description=_DESCRIPTION
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a decoder-only model")
    add(
        "--dataset",
        required=True,
        nargs="+",
        metavar="TEXT",
        help="texts, each evaluated by itself; as in calibrate",
    )
    _add_rules(parser.add_argument_group("rules and targets").add_argument)
    _add_rows(parser.add_argument_group("decoded rows").add_argument)
    _add_needles(parser.add_argument_group("hidden facts").add_argument)
    _add_run(parser.add_argument_group("run and output").add_argument)
    return parser


def _add_rules(add: Callable[..., Any]) -> None:
    add(
        "--rules",
        nargs="+",
        default=list(RULES),
        metavar="RULE",
        help=f"out of {' '.join(RULES)} (default all of these), {' '.join(SIFT)}, and, for --k, {ADAPTING}",
    )
    add(
        "--rows",
        type=float,
        nargs="*",
        default=[0.05, 0.1, 0.2],
        metavar="SHARE",
        help="shares of V rows to tune the rules to, all layers counted (default 0.05 0.1 0.2)",
    )
    add(
        "--k",
        nargs="+",
        default=[],
        metavar="K",
        help="also budgets of the table as they stand, by k or name",
    )
    add("--thresholds", metavar="TABLE", help="the model's table (default: where the server finds it)")
    add(
        "--dense-layers",
        nargs="+",
        metavar="LAYER",
        help="dense under every rule: layers, or none (default: the table's where they leave half of the target "
        "to the rule, else none)",
    )
    add(
        "--tune-on",
        metavar="TEXT",
        help="text to tune on (default: the end of each text, which isn't evaluated)",
    )


def _add_rows(add: Callable[..., Any]) -> None:
    add(
        "--max-seq-length",
        type=int,
        help="tokens of a sequence (default: the longest of --lengths and --needles, else the model's context, "
        "at most 8192)",
    )
    add(
        "--decode-rows",
        type=int,
        default=1024,
        metavar="ROWS",
        help="rows decoded under each rule; what lies before them is the dense prompt (default %(default)s)",
    )
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="contexts at which the decoded rows end, a record for each (default: --max-seq-length alone)",
    )
    add("--num-samples", type=int, default=1, help="sequences of each text (default %(default)s)")


def _add_needles(add: Callable[..., Any]) -> None:
    add(
        "--needles",
        type=int,
        nargs="+",
        default=[],
        metavar="LENGTH",
        help="hide facts in the first text, in prompts of these lengths",
    )
    add(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the facts of a prompt stand in it, 0 to 1 (default 0 0.25 0.5 0.75 1)",
    )
    add("--needles-only", action="store_true", help="leave out what the texts themselves would lose")


def _add_run(add: Callable[..., Any]) -> None:
    add("--device", help="cpu, cuda, cuda:N, or auto for all GPUs (default: a GPU where there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the records; the file must not exist")
    add("--plot", type=Path, metavar="FILE", help="plot loss against rows (.png, .svg, .pdf); must not exist")
    add("--dry-run", action="store_true", help="check everything, print what would be run, load no weights")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a line for each record, and writes what was asked for."""
    try:
        _run(_options(args), args.dry_run)
    except (ReplayError, OSError) as error:
        raise UserError(str(error)) from error
    return 0


def _options(args: argparse.Namespace) -> EvaluationOptions:
    return EvaluationOptions(
        model=args.model,
        dataset=tuple(args.dataset),
        rules=tuple(dict.fromkeys(args.rules)),
        rows=tuple(sorted(set(args.rows))),
        ks=tuple(int(k) if k.isdecimal() else k for k in dict.fromkeys(args.k)),
        thresholds=args.thresholds,
        dense_layers=_layers(args.dense_layers),
        max_seq_length=args.max_seq_length,
        decode_rows=args.decode_rows,
        lengths=tuple(sorted(set(args.lengths))),
        num_samples=args.num_samples,
        tune_on=args.tune_on,
        needles=tuple(sorted(set(args.needles))),
        needles_only=args.needles_only,
        depths=tuple(sorted(set(args.depths))),
        device=args.device,
        dtype=args.dtype,
        json=args.json,
        plot=args.plot,
    )


def _layers(given: list[str] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    if given == ["none"]:
        return ()
    try:
        return tuple(sorted({int(layer) for layer in given}))
    except ValueError as error:
        raise UserError(f"--dense-layers {' '.join(given)}: layer numbers, or none") from error


def _run(options: EvaluationOptions, dry_run: bool) -> None:
    from topt_vllm.cli.bench_output import provenance
    from topt_vllm.evaluation.plan import prepare
    from topt_vllm.evaluation.plot import plot
    from topt_vllm.evaluation.records import HEADER, line
    from topt_vllm.evaluation.run import evaluate

    plan = prepare(options)
    print(_resolved(plan))
    for text in (text for text in plan.texts if text.calibrated):
        print(
            f"note: the table was calibrated on {text.name}; its losses there are no measure of other texts'",
            file=sys.stderr,
        )
    if dry_run:
        return
    origin = provenance() | {"dtype": options.dtype} | _subject(plan)
    print(HEADER)
    records: list[dict[str, Any]] = []
    for record in evaluate(plan):
        print(line(record), flush=True)
        records.append({**record, "provenance": origin})
        if options.json:
            # After each record, so that a run that is stopped leaves what it has found.
            options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(records, options.plot)


def _subject(plan: "Plan") -> dict[str, Any]:
    """Model and table, so that a reader of the records can tell whether they speak about the table at hand."""
    return {
        "model": plan.subject.identity.id,
        "fingerprint": plan.subject.identity.fingerprint,
        "table": str(plan.path),
        "table_sha256": hashlib.sha256(plan.path.read_bytes()).hexdigest(),
    }


def _resolved(plan: "Plan") -> str:
    options, subject = plan.options, plan.subject
    dense = {
        f"{target:.0%}": ", ".join(map(str, sorted(layers))) or "none"
        for target, layers in plan.dense.items()
    }
    needles = f"{', '.join(map(str, options.needles))} tokens, depths {', '.join(map(str, options.depths))}"
    lines = {
        "model": f"{options.model} ({subject.identity.architecture}), {options.dtype}",
        "table": plan.path,
        "texts": ", ".join(text.name for text in plan.texts),
        "tuned on": ", ".join(dict.fromkeys(text.tuned_on for text in plan.texts)),
        "sequences": f"{options.num_samples} of each text, of {plan.max_seq_length} tokens",
        "rules": ", ".join(options.rules),
        "decoded": "; ".join(f"{plan.count(length)} rows up to {length} tokens" for length in plan.lengths)
        or "-",
        "dense layers": "; ".join(f"at {target}: {layers}" for target, layers in dense.items()) or "-",
        "budgets": ", ".join(f"k={k}" for k in options.ks) or "-",
        "needles": needles if options.needles else "-",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())
