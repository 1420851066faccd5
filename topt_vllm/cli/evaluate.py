"""``topt-vllm evaluate``: what rules that skip V rows cost, at equal rows read."""

import argparse
import hashlib
import json
import sys
from typing import TYPE_CHECKING, Any

from topt_vllm.cli.options import add_options, read_options
from topt_vllm.evaluation.options import EvaluationOptions
from topt_vllm.output import write_text

if TYPE_CHECKING:
    from topt_vllm.evaluation.plan import Plan

_DESCRIPTION = """Decodes the last rows of texts behind a densely attended prompt, as a server does, under rules
that skip V rows, and compares them with dense attention: perplexity, divergence, agreement; with --needles
the retrieval of hidden facts, with --tasks answers about long prompts, with --generate texts of their own.
Each rule has one parameter, tuned so that the rules read equally many V rows."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "evaluate", help="measure what skipping costs, beside other rules", description=_DESCRIPTION
    )
    groups = add_options(parser, EvaluationOptions)
    groups["run and output"].add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be run, load no weights"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a line for each record, and writes what was asked for."""
    from topt_vllm.cli.bench_output import provenance
    from topt_vllm.evaluation.plan import prepare
    from topt_vllm.evaluation.plot import plot
    from topt_vllm.evaluation.records import HEADER, line
    from topt_vllm.evaluation.run import evaluate
    from topt_vllm.evaluation.task_records import summary

    options = read_options(EvaluationOptions, args)
    plan = prepare(options)
    print(_resolved(plan))
    for text in (text for text in plan.texts if text.calibrated):
        print(
            f"note: the table was calibrated on {text.name}; its losses there are no measure of other texts'",
            file=sys.stderr,
        )
    if args.dry_run:
        return 0
    origin = provenance() | {"dtype": options.dtype} | _subject(plan)
    print(HEADER)
    records: list[dict[str, Any]] = []
    for record in evaluate(plan):
        print(line(record), flush=True)
        records.append({**record, "provenance": origin})
        if options.json:
            # After each record, so that a run that is stopped leaves what it has found. Only its own is replaced.
            write_text(
                json.dumps(records, indent=1, allow_nan=False) + "\n", options.json, force=len(records) > 1
            )
    if tasks := summary(records):
        print(tasks)
    if options.plot:
        plot(records, options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)
    return 0


def _subject(plan: "Plan") -> dict[str, Any]:
    """Model and table, so that a reader of the records can tell whether they speak about the table at hand."""
    return {
        "model": plan.subject.identity.id,
        "fingerprint": plan.subject.identity.fingerprint,
        "table": str(plan.path),
        "table_sha256": hashlib.sha256(plan.path.read_bytes()).hexdigest(),
    }


def _resolved(plan: "Plan") -> str:
    from topt_vllm.table.words import layers_in_words

    options, subject = plan.options, plan.subject
    dense = [f"{layers_in_words(layers)} at {100 * target:g}%" for target, layers in plan.dense.items()]
    needles = f"{', '.join(map(str, options.needles))} tokens, depths {', '.join(map(str, options.depths))}"
    lines = {
        "model": f"{options.model} ({subject.identity.architecture}), {options.dtype}",
        "table": plan.path,
        "texts": ", ".join(text.name for text in plan.texts),
        "tuned on": ", ".join(dict.fromkeys(text.tuned_on for text in plan.texts if options.rows)) or "-",
        "sequences": f"{options.num_samples} of each text, of {plan.max_seq_length} tokens",
        "rules": ", ".join(options.rules),
        "decoded": "; ".join(f"{plan.count(length)} rows up to {length} tokens" for length in plan.lengths)
        or "-",
        "work": "each run repeats the whole sequence, for some layers keep a state"
        if subject.stateful
        else "each run repeats the decoded rows",
        "dense layers": "; ".join(dense) or "-",
        "budgets": ", ".join(map(str, options.ks)) or "-",
        "K screens": ", ".join(options.k_screens),
        "needles": needles if options.needles else "-",
        "tasks": f"{', '.join(options.tasks)}; {options.task_cases} questions each, in prompts of "
        f"{', '.join(map(str, options.task_lengths))} tokens"
        if options.tasks
        else "-",
        "generated": "; ".join(f"{options.generate} tokens up to {length}" for length in plan.generated)
        or "-",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())
