"""``topt-vllm inspect``: what a threshold table holds."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topt_vllm.table.schema import ThresholdTable


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser("inspect", help="show what a threshold table holds")
    parser.add_argument("table", type=Path, help="YAML file; topt-vllm verify names that of a model")
    parser.add_argument("--json", action="store_true", help="print one JSON object without the thresholds")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw θ by layer and head, rows by layer, and loss against rows of every budget; it must not exist",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the table's identity, origin, lengths and budgets."""
    from topt_vllm.calibration.plot import plot
    from topt_vllm.calibration.summary import describe
    from topt_vllm.table.file import load

    table = load(args.table)
    if args.plot is not None:
        plot(table, args.plot)
        # Not to the standard output, which may be one JSON object.
        print(f"wrote {args.plot}", file=sys.stderr)
    print(json.dumps(_facts(table), ensure_ascii=False) if args.json else describe(table))
    return 0


def _facts(table: "ThresholdTable") -> dict[str, Any]:
    facts = table.model_dump(exclude={"budgets", "key_statistics"})
    statistics = table.key_statistics
    facts["key_statistics"] = statistics and {
        "seed": statistics.seed,
        "layers": [entry.layer for entry in statistics.layers],
    }
    facts["budgets"] = [budget.model_dump(exclude={"layers"}) for budget in table.budgets]
    return facts
