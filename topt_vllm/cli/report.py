"""``topt-vllm report``: one HTML page about a threshold table."""

import argparse
from pathlib import Path
from typing import Any

from topt_vllm.errors import UserError

_DESCRIPTION = """Writes one HTML page: where the table comes from, what its budgets were measured to do,
θ by layer and head, rows by layer; and, from the JSON files of evaluate and bench, losses beside other rules, the
retrieval of hidden facts, and speed. The page loads nothing and has no script."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "report", help="write an HTML page about a table, its quality and speed", description=_DESCRIPTION
    )
    add = parser.add_argument
    add("table", type=Path, help="YAML file")
    files: dict[str, Any] = {"type": Path, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    add(
        "--evaluation",
        **files,
        help="written by topt-vllm evaluate --json, with or without --needles and --tasks",
    )
    add("--bench", **files, help="written by topt-vllm bench decode --json or bench serve --json")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="page to write; it must not exist")
    add("--force", action="store_true", help="replace an existing page")
    return parser


def run(args: argparse.Namespace) -> int:
    """Reads everything, then writes the page in one step."""
    from topt_vllm.output import is_one_of, refuse_overwrite, write_text
    from topt_vllm.report.inputs import read
    from topt_vllm.report.page import render

    refuse_overwrite(args.output, args.force)
    if is_one_of(args.output, (args.table, *args.evaluation, *args.bench)):
        raise UserError(f"{args.output} is read for the report; name another file for the page")
    page = render(read(args.table, args.evaluation, args.bench))
    write_text(page, args.output, args.force)
    print(f"wrote {args.output}: {len(page.encode()) / 1024:.0f} KiB, opens in any browser, loads nothing")
    return 0
