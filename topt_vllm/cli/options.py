"""From dataclasses of options to command line arguments, and back."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from topt_vllm.errors import UserError
from topt_vllm.replay.options import flag_of


def add_options(parser: argparse.ArgumentParser, options: type) -> dict[str | None, Any]:
    """Adds an argument for each field that :func:`topt_vllm.replay.options.option` has stated.

    Returns:
        The groups of the help by heading, for what else belongs there.
    """
    groups: dict[str | None, Any] = {None: parser}
    kinds = get_type_hints(options)
    for field in fields(options):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        names = [flag_of(field)] + ([f"--{alias}"] if (alias := field.metadata["alias"]) else [])
        groups[group].add_argument(*names, **_arguments(field, kinds[field.name]))
    return groups


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Adds the argument to a command that loads a model and whose options are no dataclass."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def read_options(options: type, args: argparse.Namespace, **known: Any) -> Any:
    """The options as they were given.

    Args:
        options: The dataclass.
        args: What argparse has made of the command line.
        known: Values of fields that follow from others.
    """
    values = {}
    for field in fields(options):
        value = getattr(args, flag_of(field).removeprefix("--").replace("-", "_"))
        convert = field.metadata["more"].get("convert", tuple if isinstance(value, list) else None)
        values[field.name] = value if convert is None or value is None else convert(value)
    return options(**values | known)


def _arguments(field: Field, kind: Any) -> dict[str, Any]:
    """What ``add_argument`` is told: by the field's type, unless the option says otherwise."""
    if kind is bool:
        return {"action": "store_true", "help": field.metadata["help"]}
    found: dict[str, Any] = {"help": field.metadata["help"]}
    if isinstance(kind, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        kind, found["nargs"] = get_args(kind)[0], "+"
    if isinstance(kind, type) and kind is not str:
        found["type"] = kind
    required = {"required": True} if field.default is MISSING else {"default": field.default}
    more = {name: value for name, value in field.metadata["more"].items() if name != "convert"}
    return found | required | more


def check_least(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Refuses numbers that are too small; options that weren't given pass.

    Args:
        args: What argparse has made of the command line.
        least: The smallest that makes sense, by option.

    Raises:
        UserError: One is smaller, or no number.
    """
    for name, smallest in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value >= smallest:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least {smallest} is needed")


def json_object(example: str) -> Any:
    """The type of an option that takes a JSON object, such as the example."""

    def read(text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise argparse.ArgumentTypeError(f"{text!r}: a JSON object is expected, such as '{example}'")
        return found

    return read
