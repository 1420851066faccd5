"""Where the threshold table of a served model comes from."""

import os
from functools import lru_cache
from pathlib import Path

from topt_vllm import envs
from topt_vllm.config import NO_THRESHOLDS, TopThetaConfig
from topt_vllm.table.command import TABLE_IN_MODEL_FOLDER, calibrate_command
from topt_vllm.table.file import load
from topt_vllm.table.identity import ModelIdentity
from topt_vllm.table.schema import ThresholdTable, ThresholdTableError
from topt_vllm.table.words import printable


def find_table(
    config: TopThetaConfig, identity: ModelIdentity, model: str, revision: str | None
) -> tuple[ThresholdTable, Path] | None:
    """Finds, loads and checks the table of a model.

    The first of these that exists is used: ``config.thresholds``; the environment variable ``TOPT_THRESHOLDS``;
    ``toptheta.yaml`` in the model's folder; a shipped table of the same fingerprint.

    Args:
        config: The plugin's configuration.
        identity: Identity of the served model.
        model: Its folder or hub id.
        revision: Its hub revision, where given.

    Returns:
        The table and its path, or None for θ = −inf: by choice (``none``), or with ``on_missing: dense``.

    Raises:
        ThresholdTableError: No table, a broken one, or one of another model.
    """
    if chooses_no_table(config):
        return None
    named = config.thresholds or envs.get("TOPT_THRESHOLDS")
    candidates = (
        [Path(os.path.expanduser(named))] if named else _model_folder(model, revision) or _shipped(identity)
    )
    if not candidates:
        if config.on_missing == "dense":
            return None
        raise ThresholdTableError(
            f"no threshold table for {model}: toptheta.thresholds and TOPT_THRESHOLDS are unset, its folder "
            f"has no {TABLE_IN_MODEL_FOLDER}, and no shipped table has the fingerprint {identity.fingerprint}. "
            f"Calibrate one (minutes, once per model):\n    {calibrate_command(model)}\n"
            'or serve with every row kept: --additional-config \'{"toptheta": {"thresholds": "none"}}\''
        )
    if len(candidates) > 1:
        raise ThresholdTableError(
            f"several shipped tables have the fingerprint of {model}, {identity.fingerprint}: "
            f"{', '.join(map(str, candidates))}. Name the one to use with toptheta.thresholds."
        )
    path = candidates[0]
    # Whoever named no table doesn't know where this one comes from.
    source = "TOPT_THRESHOLDS names " if named and config.thresholds is None else ""
    try:
        table = _load(path, _version(path))
    except ThresholdTableError as error:
        raise ThresholdTableError(f"{source}{error}") from error
    difference = identity.difference(table.model)
    if difference:
        raise ThresholdTableError(
            f"{source}{path}: model: this table belongs to {printable(table.model.id[:80])}, not to {model}: "
            f"{difference} (served model against table). Calibrate one:\n    {calibrate_command(model)}"
        )
    return table, path


def chooses_no_table(config: TopThetaConfig) -> bool:
    """Whether θ = −inf was asked for, in the configuration or the environment."""
    return (config.thresholds or envs.get("TOPT_THRESHOLDS")) == NO_THRESHOLDS


@lru_cache(maxsize=2)
def _load(path: Path, version: tuple[int, ...] | None) -> ThresholdTable:
    """Once for all who ask: the front end checks the table, and each layer of a worker asks again."""
    return load(path)


def _version(path: Path) -> tuple[int, ...] | None:
    """Changes with the file, which a process that starts several engines may find mended; None without a file."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # whoever reads it says so
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _model_folder(model: str, revision: str | None) -> list[Path]:
    folder = Path(model)
    if folder.is_dir():
        path = folder / TABLE_IN_MODEL_FOLDER
        return [path] if path.is_file() else []
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, TABLE_IN_MODEL_FOLDER, revision=revision)
    except HFValidationError:
        # A capture knows its model by the folder's name, which needn't be one for the hub.
        return []
    return [Path(cached)] if isinstance(cached, str) else []


def _shipped(identity: ModelIdentity) -> list[Path]:
    """Shipped tables of this model: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        found = [
            path for path in sorted(folder.glob("*.yaml")) if _names_fingerprint(path, identity.fingerprint)
        ]
        if found:
            return found
    return []


def _names_fingerprint(path: Path, fingerprint: str) -> bool:
    # The identity stands at the top; a look at it is cheaper than parsing every shipped table.
    with path.open(encoding="utf-8") as file:
        return fingerprint in file.read(4096)
