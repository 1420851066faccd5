"""The command lines that messages show. Imports nothing heavy: error messages of the server use it."""

import json
import os
import shlex
from pathlib import Path

TABLE_IN_MODEL_FOLDER = "toptheta.yaml"


def default_output(model: str) -> Path:
    """Where the table goes without ``--output``: the model's folder, where the server looks by itself."""
    if os.path.isdir(model):
        return Path(model) / TABLE_IN_MODEL_FOLDER
    return Path(model.rstrip("/").rsplit("/", 1)[-1] + ".yaml")


def calibrate_command(model: str) -> str:
    """The command that makes a model's threshold table; the text file is the user's to choose.

    Args:
        model: Folder or hub id.
    """
    return f"topt-vllm calibrate --model {shlex.quote(model)} --dataset TEXT_FILE.txt --budget auto --max-loss 1%"


def lacks_key_statistics(model: str, table: Path) -> str:
    """Says that a table lacks what a K screen needs, and how to add it; arguments as :func:`serve_command`."""
    return (
        f"{table} has no key_statistics, which a K screen is made with. Add them, with a text of the kind that you "
        f"serve:\n  {_k_screen_command(model, table)}"
    )


def _k_screen_command(model: str, table: Path) -> str:
    command = f"topt-vllm calibrate --model {shlex.quote(model)} --dataset TEXT_FILE.txt --k-screen-only"
    return command if _is_found(model, table) else f"{command} --output {shlex.quote(str(table.resolve()))}"


def serve_command(model: str, table: Path) -> str:
    """The command that serves a model with a table.

    Args:
        model: Folder or hub id.
        table: The table; left out of the command where the server finds it by itself.
    """
    command = f"vllm serve {shlex.quote(model)} --attention-backend TOPTHETA"
    if _is_found(model, table):
        return command
    settings = json.dumps({"toptheta": {"thresholds": str(table.resolve())}}, ensure_ascii=False)
    return f"{command} --additional-config {shlex.quote(settings)}"


def _is_found(model: str, table: Path) -> bool:
    """Whether the server finds the table by itself."""
    return os.path.isdir(model) and table.resolve() == Path(model).resolve() / TABLE_IN_MODEL_FOLDER
