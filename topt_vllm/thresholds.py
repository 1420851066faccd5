"""The threshold table: a versioned YAML contract between the calibrator and the server.

The format is described in the README. Loading is strict: whatever does not belong, is missing or does not add up
is an error with the file and the key path. ``dump(load(x))`` gives the same bytes.
"""

import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topt_vllm.attention.common import Thetas
from topt_vllm.model_identity import ModelIdentity

SCHEMA_VERSION = 1
_HEADER = "# Thresholds of Top-Theta attention; written by `topt-vllm calibrate`. θ is in scaled logits.\n"

# libyaml's loader is ten times faster than the pure Python one and just as safe.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class ThresholdTableError(ValueError):
    """A table that can't be used; the message names the file, the key path and both values."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Producer(_Strict):
    """Which program wrote the table."""

    name: str
    version: str


class TextSource(_Strict):
    """One calibration text.

    Attributes:
        name: File name or hub id.
        sha256: Digest of the text; None for a hub dataset.
    """

    name: str
    sha256: str | None


class Provenance(_Strict):
    """How the thresholds came about.

    Attributes:
        data: The texts.
        num_samples: Token sequences that were run.
        tokens: Tokens that were run.
        max_seq_length: Tokens of the longest sequence.
        seed: Of every random choice.
        options: Calibrator options that shape θ.
        libraries: Versions.
        date: ISO date.
    """

    data: list[TextSource] = Field(min_length=1)
    num_samples: int = Field(gt=0)
    tokens: int = Field(gt=0)
    max_seq_length: int = Field(gt=0)
    seed: int
    options: dict[str, str | int | float | bool | None]
    libraries: dict[str, str]
    date: str


class Spread(_Strict):
    """Percentiles of a quantity over layers, heads and rows."""

    p5: float
    p50: float
    p95: float


class Quality(_Strict):
    """What a budget did on text held back from calibration.

    Attributes:
        kept_over_k: Keys that a head keeps by its own rule, over k, in the sparse layers.
        v_rows_read: Share of V rows read, union over the GQA group, all layers counted.
        dropped_mass: Mean probability dropped per query head, sparse layers.
        tokens: Held-back tokens.
    """

    kept_over_k: Spread
    v_rows_read: float
    dropped_mass: float
    tokens: int


class LayerThresholds(_Strict):
    """Thresholds of one layer.

    Attributes:
        layer: Index in the model.
        law: Per query head [c0, c1] of θ(n) = c0 + c1 ln n.
        theta: Per query head, θ at each of the table's lengths.
    """

    layer: int
    law: list[list[float]]
    theta: list[list[float]]


class Budget(_Strict):
    """Thresholds for one budget.

    Attributes:
        k: Keys that a query head should keep.
        dense_layers: Layers to attend densely.
        quality: Measured on held-back text; None when no text was held back.
        layers: One entry for every layer without a sliding window, in order.
    """

    k: int = Field(gt=0)
    dense_layers: list[int]
    quality: Quality | None
    layers: list[LayerThresholds]


class ThresholdTable(_Strict):
    """A whole table; see the README for the format.

    Attributes:
        schema_version: Of this format.
        producer: Which program wrote it.
        model: The model it belongs to.
        calibration: How it came about.
        lengths: Context lengths at which θ is given, ascending.
        budgets: In ascending k.
    """

    schema_version: int
    producer: Producer
    model: ModelIdentity
    calibration: Provenance
    lengths: list[int] = Field(min_length=1)
    budgets: list[Budget] = Field(min_length=1)

    def budget(self, k: int | None) -> Budget:
        """The budget with this k; without one, the largest, which loses least.

        Raises:
            ThresholdTableError: No such budget.
        """
        if k is None:
            return self.budgets[-1]
        for budget in self.budgets:
            if budget.k == k:
                return budget
        offered = ", ".join(str(budget.k) for budget in self.budgets)
        raise ThresholdTableError(
            f"k is {k}, but the table has budgets {offered}; choose one of them or recalibrate"
        )

    def thetas(self, budget: Budget) -> dict[int, Thetas]:
        """Thresholds of the budget's sparse layers, by layer index, float32 over all query heads."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return {
            entry.layer: Thetas(
                lengths,
                torch.tensor(entry.theta, dtype=torch.float32),
                torch.tensor(entry.law, dtype=torch.float32),
            )
            for entry in budget.layers
            if entry.layer not in budget.dense_layers
        }


def load(path: str | os.PathLike[str]) -> ThresholdTable:
    """Reads and checks a table.

    Raises:
        ThresholdTableError: The file is missing, isn't YAML, or breaks the schema.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThresholdTableError(f"{path}: can't be read: {error}") from error
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ThresholdTableError(f"{path}: not valid YAML: {error}") from error
    return _parse(content, path)


def dumps(table: ThresholdTable) -> str:
    """The table as YAML text; the same table gives the same text."""
    body = yaml.dump(
        table.model_dump(),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=2**31 - 1,
        allow_unicode=True,
    )
    return _HEADER + body


def dump(table: ThresholdTable, path: str | os.PathLike[str], force: bool = False) -> None:
    """Writes a table in one step: a reader sees the old file or the whole new one.

    Raises:
        FileExistsError: The file exists and ``force`` is not set.
        ThresholdTableError: The table breaks the schema's rules, so it could not be loaded again.
    """
    path = Path(path)
    _check(table, path)
    refuse_overwrite(path, force)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(dumps(table))
        os.chmod(temporary, 0o644)
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raises FileExistsError when ``path`` exists and ``force`` is not set; call it before the long work."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; give another --output, or --force to replace it")


def _parse(content: Any, path: Path) -> ThresholdTable:
    if not isinstance(content, dict):
        raise ThresholdTableError(f"{path}: a mapping was expected, got {type(content).__name__}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ThresholdTableError(
            f"{path}: schema_version is {version!r}, this release reads {SCHEMA_VERSION}; calibrate again"
        )
    try:
        table = ThresholdTable.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ThresholdTableError(f"{path}: {_key_path(first['loc'])}: {_problem(first)}{more}") from error
    _check(table, path)
    return table


def _key_path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _problem(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; remove it"
    if error["type"] == "missing":
        return "missing key"
    return f"{error['msg']}, got {error['input']!r}"


def _check(table: ThresholdTable, path: Path) -> None:
    """What types can't say: order, counts and finiteness."""

    def require(condition: bool, key: str, problem: str) -> None:
        if not condition:
            raise ThresholdTableError(f"{path}: {key}: {problem}")

    lengths, model = table.lengths, table.model
    require(
        lengths[0] > 0 and all(a < b for a, b in pairwise(lengths)),
        "lengths",
        f"must be positive and strictly ascending, got {lengths}",
    )
    ks = [budget.k for budget in table.budgets]
    require(all(a < b for a, b in pairwise(ks)), "budgets", f"k must be strictly ascending, got {ks}")
    expected = [layer for layer in range(model.num_layers) if layer not in model.sliding_window_layers]
    for b, budget in enumerate(table.budgets):
        key = f"budgets[{b}]"
        unknown = sorted(set(budget.dense_layers) - set(expected))
        require(
            not unknown, f"{key}.dense_layers", f"layers {unknown} are not among the full-attention layers"
        )
        found = [entry.layer for entry in budget.layers]
        require(found == expected, f"{key}.layers", f"layers {expected} expected in this order, got {found}")
        for position, entry in enumerate(budget.layers):
            for name, rows, width in (("law", entry.law, 2), ("theta", entry.theta, len(lengths))):
                where = f"{key}.layers[{position}].{name}"
                require(
                    len(rows) == model.num_query_heads,
                    where,
                    f"{model.num_query_heads} query heads expected, got {len(rows)}",
                )
                for head, row in enumerate(rows):
                    require(
                        len(row) == width, f"{where}[{head}]", f"{width} numbers expected, got {len(row)}"
                    )
                    require(
                        all(math.isfinite(number) for number in row),
                        f"{where}[{head}]",
                        f"must be finite, got {row}",
                    )
