"""What calibration and evaluation are asked alike, and how an option is stated."""

from argparse import ArgumentTypeError
from dataclasses import MISSING, Field, field
from typing import Any

from topt_vllm.errors import UserError

# The default of an option that has to be given.
REQUIRED = MISSING

DTYPES = ("auto", "float32", "bfloat16", "float16")


class ReplayError(UserError):
    """A model, a text or an option that can't be used; the message says what to change."""


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    flag: str | None = None,
    alias: str | None = None,
    kw_only: bool = False,
    **more: Any,
) -> Any:
    """A field of a dataclass that is set on the command line; :mod:`topt_vllm.cli.options` makes the argument.

    Args:
        default: What is taken without it; ``REQUIRED`` where it is required.
        help: For people; ``%(default)s`` stands for the default.
        group: Heading under which the help lists it.
        flag: Its name, without leading dashes; None for the field's own.
        alias: Another name for it.
        kw_only: Whether Python callers have to name it.
        more: Further arguments of argparse's ``add_argument``, where the field's type doesn't say them, and
            ``convert``, from what was parsed to the field's value.
    """
    stated = {"help": help, "group": group, "flag": flag, "alias": alias, "more": more}
    return field(default=default, metadata=stated, kw_only=kw_only)


def table_name(text: str) -> str:
    """The type of an option that names a table.

    Raises:
        ArgumentTypeError: The name is empty, as that of a shell's variable that isn't set.
    """
    if not text:
        raise ArgumentTypeError(
            "a table is expected, got ''; name one, or leave the option out for its default"
        )
    return text


def flag_of(field: Field) -> str:
    """How an option is written on the command line."""
    return f"--{field.metadata['flag'] or field.name.replace('_', '-')}"
