"""The plugin's configuration: ``--additional-config '{"toptheta": {...}}'``."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal, cast, get_args

from topt_vllm.attention.common import LONGEST_CONTEXT, Compensation, GroupKeep, Selection
from topt_vllm.attention.margin import DEFAULT_MARGIN, HARD, read_margin
from topt_vllm.attention.screen import ScreenFormat
from topt_vllm.errors import UserError
from topt_vllm.sift import SiftSettings

logger = logging.getLogger("vllm.topt_vllm")

NO_THRESHOLDS = "none"

# A number of each head and dense row of a request is kept.
_LONGEST_WARM_UP = 4096
# No error is so many standard deviations.
_LARGEST_MARGIN = 1000


class ConfigError(UserError):
    """A setting that can't be used; the message has key, value, allowed values and remedy."""


@dataclass(frozen=True)
class _Rule:
    allowed: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_margin(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value == HARD or (number and 0.0 <= value <= _LARGEST_MARGIN)


def _is_name(value: Any) -> bool:
    """A number in quotes is a slip, not a name."""
    return isinstance(value, str) and value != "" and not value.isdigit()


def _one_of(*names: str) -> _Rule:
    return _Rule(" | ".join(names), lambda value: value in names)


_RULES = {
    "policy": _one_of("toptheta", "sift"),
    "thresholds": _Rule(
        'a path, or "none" for θ = −inf',
        lambda value: value is None or (isinstance(value, str) and value != ""),
    ),
    "budget": _Rule(
        "an integer of at least 1, or the name of a budget",
        lambda value: value is None or _is_int(value, 1) or _is_name(value),
    ),
    "min_seq_len": _Rule("an integer of at least 0 (tokens)", lambda value: _is_int(value, 0)),
    "sink_tokens": _Rule("an integer of at least 0 (tokens)", lambda value: _is_int(value, 0)),
    "recent_tokens": _Rule("an integer of at least 1 (tokens)", lambda value: _is_int(value, 1)),
    "group_keep": _one_of("head", "union"),
    "compensation": _one_of("none", "vmean"),
    "k_screen": _one_of("auto", "off", *get_args(ScreenFormat)),
    "k_screen_margin": _Rule(
        f'a number from 0 to {_LARGEST_MARGIN} (standard deviations), or "hard"', _is_margin
    ),
    "adapt": _Rule("true | false", lambda value: isinstance(value, bool)),
    "sift_tau": _Rule(
        "a number above 0 and below 1", lambda value: isinstance(value, float) and 0.0 < value < 1.0
    ),
    "sift_warmup": _Rule(
        f"an integer from 2 to {_LONGEST_WARM_UP} (rows)",
        lambda value: _is_int(value, 2) and value <= _LONGEST_WARM_UP,
    ),
    "implementation": _one_of("auto", "cpu", "triton", "reference"),
    "on_missing": _one_of("error", "dense"),
    "per_layer_metrics": _Rule("true | false", lambda value: isinstance(value, bool)),
}


# How people also write "toptheta", in letters alone.
_NAMES = ("toptheta", "toptvllm")

# What a configuration without thresholds contradicts, and why.
_NEEDS_THRESHOLDS = {
    "budget": "has no budgets",
    "adapt": "leaves nothing to adapt",
    "k_screen": "leaves nothing to screen",
}


def _check(name: str, value: Any, rule: _Rule) -> None:
    if not rule.accepts(value):
        raise ConfigError(
            f"toptheta.{name} is {value!r} ({type(value).__name__}); allowed: {rule.allowed}. "
            "Mend it in --additional-config or leave it out for the default."
        )


def _renamed(section: Mapping[Any, Any]) -> dict[Any, Any]:
    """The section with ``budget`` in place of ``k``, its former name, which this release is the last to take."""
    if "k" not in section:
        return dict(section)
    value = section["k"]
    if "budget" in section:
        raise ConfigError(
            f"toptheta.k is {value!r} and toptheta.budget is {section['budget']!r}, but k is only the former name "
            "of budget. Leave k out."
        )
    _check("k", value, _RULES["budget"])
    _warn_of_k(value)
    return {"budget" if key == "k" else key: setting for key, setting in section.items()}


def _refuse_outside(additional_config: Mapping[Any, Any]) -> None:
    """Settings without their level, or with its name misspelt, would be ignored, and defaults run."""
    ours = {key: value for key, value in additional_config.items() if key in _RULES or key == "k"}
    if ours:
        first, example = next(iter(ours)), json.dumps({"toptheta": ours}, ensure_ascii=False, default=str)
        raise ConfigError(
            f'{first} (value {ours[first]!r}) stands beside "toptheta", where it would have no effect. Settings of '
            f"TOPTHETA stand inside it: --additional-config '{example}'"
        )
    for key in additional_config:
        letters = re.sub("[^a-z]", "", str(key).lower())
        # Short names of others are like a short one of ours: "opt".
        if key != "toptheta" and (letters == "topt" or get_close_matches(letters, _NAMES, cutoff=0.85)):
            raise ConfigError(f'{key} is not the key of TOPTHETA\'s settings; it is written "toptheta"')


@lru_cache(maxsize=1)
def _warn_of_k(value: int | str | None) -> None:
    """Once in a process, though each layer reads the settings."""
    logger.warning(
        'TOPTHETA: the setting "k" is now named "budget", and the next release won\'t take the old name: '
        'write {"toptheta": {"budget": %s}} in --additional-config',
        json.dumps(value, ensure_ascii=False),
    )


@dataclass(frozen=True)
class TopThetaConfig:
    """Settings of the backend; each is a key of ``toptheta`` in ``--additional-config``.

    Attributes:
        policy: ``toptheta``: thresholds of a calibrated table. ``sift``: each request finds its own in its first
            decoded rows (SiftAttention, see ``sift.py``); no table.
        thresholds: Path of the table; ``none`` for θ = −inf; unset to search for it (see ``table/search.py``).
        budget: Which budget of the table, by its k or name; unset for its last: the largest k, or a named one.
        min_seq_len: Contexts up to this many tokens are attended densely.
        sink_tokens: First tokens of the context that are always kept.
        recent_tokens: Last tokens of the context that are always kept.
        group_keep: Whether the heads of a GQA group share the V rows that any of them keeps.
        compensation: What stands in for the dropped rows.
        k_screen: Format of a low-bit copy of K from which keys that can't reach θ are dropped before their K is
            read: ``int4`` reads K of the others, ``int4+4`` the copy's second half instead. ``auto`` has one where
            it was measured to pay.
        k_screen_margin: How far below θ the copy may see a key that is still looked at: standard deviations of its
            error, or ``hard`` for a bound that misses none.
        adapt: Whether thresholds follow the traffic, so that each head keeps the keys that its budget promises (see
            ``adaptation.py``).
        sift_tau: Share of its keys that a query head skips under ``policy: sift``.
        sift_warmup: Rows of each request that are dense before ``policy: sift`` knows its thresholds.
        implementation: Kernel; a named one runs or start-up fails.
        on_missing: Without a table, fail at start-up (``error``) or keep every row (``dense``).
        per_layer_metrics: Whether the metrics also have the V rows of each layer.
    """

    policy: Literal["toptheta", "sift"] = "toptheta"
    thresholds: str | None = None
    budget: int | str | None = None
    min_seq_len: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 1
    group_keep: GroupKeep = "union"
    compensation: Compensation = "vmean"
    k_screen: Literal["auto", "off"] | ScreenFormat = "auto"
    k_screen_margin: float | Literal["hard"] = DEFAULT_MARGIN
    adapt: bool = False
    sift_tau: float = 0.95
    sift_warmup: int = 32
    implementation: Literal["auto", "cpu", "triton", "reference"] = "auto"
    on_missing: Literal["error", "dense"] = "error"
    per_layer_metrics: bool = False

    def __post_init__(self) -> None:
        if self.k_screen == "int8":
            raise ConfigError(
                "toptheta.k_screen is 'int8', which is gone: 4-bit screens read less and take less memory. Write "
                '"int4+4" on CPUs, "int4" on GPUs, or leave it out.'
            )
        for field in fields(self):
            _check(field.name, getattr(self, field.name), _RULES[field.name])
        self._check_policy()
        self._check_thresholds()
        if self.screen is None and self._is_set("k_screen_margin"):
            raise ConfigError(
                f"toptheta.k_screen_margin is {self.k_screen_margin!r}, but toptheta.k_screen is "
                f'"{self.k_screen}". Leave k_screen_margin out, or name a screen.'
            )

    def _check_thresholds(self) -> None:
        if self.thresholds == NO_THRESHOLDS:
            for name in filter(self._is_set, _NEEDS_THRESHOLDS):
                value = json.dumps(getattr(self, name), ensure_ascii=False)
                raise ConfigError(
                    f'toptheta.{name} is {value}, but toptheta.thresholds is "none", which '
                    f"{_NEEDS_THRESHOLDS[name]}. Leave {name} out, or name a table."
                )
        if self.thresholds is not None and self.on_missing == "dense":
            raise ConfigError(
                'toptheta.on_missing is "dense", but toptheta.thresholds says where the table is. '
                "Leave one of them out."
            )

    def _is_set(self, name: str) -> bool:
        """Whether a setting isn't its default, which the class has; of a K screen: whether it is named."""
        if name == "k_screen":
            return self.screen is not None
        return getattr(self, name) != getattr(TopThetaConfig, name)

    def _check_policy(self) -> None:
        sift = self.policy == "sift"
        foreign = (
            ("thresholds", "budget", "adapt", "on_missing", "k_screen")
            if sift
            else ("sift_tau", "sift_warmup")
        )
        if given := list(filter(self._is_set, foreign)):
            reason = "which has no threshold table" if sift else "which has no warm-up"
            raise ConfigError(
                f"toptheta.{given[0]} is {getattr(self, given[0])!r}, but toptheta.policy is {self.policy!r}, "
                f"{reason}. Leave {given[0]} out, or choose the other policy."
            )

    @property
    def screen(self) -> ScreenFormat | None:
        """Format of the K screen that is asked for by name; None for none."""
        return None if self.k_screen == "auto" or self.k_screen == "off" else self.k_screen

    @property
    def screen_margin(self) -> float | None:
        """Margin of the K screen in standard deviations; None for a hard bound."""
        return read_margin(self.k_screen_margin)

    @property
    def sift(self) -> SiftSettings | None:
        """Settings of ``policy: sift``; None for the other policy."""
        return SiftSettings(self.sift_tau, self.sift_warmup) if self.policy == "sift" else None

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "TopThetaConfig":
        """Reads the key ``toptheta`` of vLLM's ``additional_config``; other keys belong to others.

        There ``budget`` may still have its former name ``k``; the log then says so.

        Raises:
            ConfigError: An unknown key, a wrong type or contradictory values; or settings outside of ``toptheta``.
        """
        if isinstance(additional_config, Mapping):
            _refuse_outside(additional_config)
        section = additional_config.get("toptheta", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(section, Mapping):
            raise ConfigError(
                f"toptheta is {section!r}; an object is expected, such as "
                """--additional-config '{"toptheta": {"budget": 128}}'"""
            )
        section = _renamed(section)
        unknown = [key for key in section if key not in _RULES]
        if unknown:
            raise ConfigError(
                f"toptheta.{unknown[0]} (value {section[unknown[0]]!r}) is not a setting; "
                f"allowed: {', '.join(_RULES)}. Mend the name or remove it."
            )
        return cls(**cast(dict[str, Any], section))

    @property
    def selection(self) -> Selection:
        """The part that the operator needs; whoever asks for more tokens than it can count means all."""
        return Selection(
            min(self.min_seq_len, LONGEST_CONTEXT),
            min(self.sink_tokens, LONGEST_CONTEXT),
            min(self.recent_tokens, LONGEST_CONTEXT),
            self.group_keep,
            self.compensation,
        )
