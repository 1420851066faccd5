"""The plugin's configuration: every setting checked, every refusal with key, value, allowed values and remedy."""

import json
import logging
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from topt_vllm.attention.common import Selection
from topt_vllm.config import ConfigError, TopThetaConfig, _warn_of_k


def test_defaults_are_the_operators():
    assert TopThetaConfig().selection == Selection()
    assert TopThetaConfig.from_additional_config(None) == TopThetaConfig()
    assert TopThetaConfig.from_additional_config({"other_plugin": {"x": 1}}) == TopThetaConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"k": 32, "thresholds": "/nonexistent.yaml"},
            """k (value 32) stands beside "toptheta".* --additional-config '{"toptheta": {"k": 32, "thresh""",
        ),
        ({"toptheta": {"budget": 64}, "min_seq_len": 9}, 'min_seq_len (value 9) stands beside "toptheta"'),
        (
            {"topTheta": {"k": 32}},
            'topTheta is not the key of TOPTHETA\'s settings; it is written "toptheta"',
        ),
        ({"top-theta": {}}, 'it is written "toptheta"'),
        ({"topthetha": {}}, 'it is written "toptheta"'),
        ({"top_t": {}}, 'it is written "toptheta"'),
    ],
    ids=str,
)
def test_settings_outside_of_their_level_are_refused(given, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        TopThetaConfig.from_additional_config(given)


@pytest.mark.parametrize("key", ["opt", "top", "tot", "theta", "gpt"])
def test_keys_of_others_are_theirs(key):
    assert TopThetaConfig.from_additional_config({key: {}, "toptheta": {"budget": 64}}).budget == 64


def test_settings_reach_the_policy():
    config = TopThetaConfig.from_additional_config(
        {"toptheta": {"min_seq_len": 99, "sink_tokens": 4, "recent_tokens": 8, "group_keep": "head"}}
    )
    assert config.selection == Selection(99, 4, 8, "head", "vmean")


@pytest.mark.parametrize("tokens", [2**31 - 1, 10**12, 10**20])
def test_more_tokens_than_a_context_can_have_are_all(tokens):
    """An engine would start with a number beyond the operator's integers, and end at the first row decoded."""
    config = TopThetaConfig(min_seq_len=tokens, sink_tokens=tokens, recent_tokens=tokens)
    assert config.min_seq_len == tokens
    assert config.selection == Selection(2**31 - 1, 2**31 - 1, 2**31 - 1)


def test_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        TopThetaConfig().budget = 3  # type: ignore[misc]


@pytest.mark.parametrize(("margin", "of_the_operator"), [(0, 0), (3, 3), (2.75, 2.75), ("hard", None)])
def test_the_screen_s_margin_is_a_number_or_none_for_a_hard_bound(margin, of_the_operator):
    config = TopThetaConfig(k_screen="int4", k_screen_margin=margin)
    assert (config.screen, config.screen_margin) == ("int4", of_the_operator)
    assert (TopThetaConfig().screen, TopThetaConfig().screen_margin) == (None, 2.5)


REFUSED = {
    "unknown key": (
        {"treshold": "x"},
        ["toptheta.treshold", "'x'", "policy, thresholds, budget, min_seq_len"],
    ),
    "budget of zero": ({"budget": 0}, ["toptheta.budget is 0", "at least 1"]),
    "budget is text": ({"budget": "128"}, ["toptheta.budget is '128' (str)", "an integer of at least 1"]),
    "budget is a fraction": ({"budget": 1.5}, ["toptheta.budget is 1.5 (float)"]),
    "budget is true": ({"budget": True}, ["toptheta.budget is True (bool)"]),
    "k is zero": ({"k": 0}, ["toptheta.k is 0", "at least 1"]),
    "k is text": ({"k": "128"}, ["toptheta.k is '128' (str)", "an integer of at least 1"]),
    "k is a fraction": ({"k": 1.5}, ["toptheta.k is 1.5 (float)"]),
    "k is true": ({"k": True}, ["toptheta.k is True (bool)"]),
    "no path": ({"thresholds": ""}, ["toptheta.thresholds is ''", "a path"]),
    "path is a number": ({"thresholds": 3}, ["toptheta.thresholds is 3"]),
    "negative length": ({"min_seq_len": -1}, ["toptheta.min_seq_len is -1", "at least 0"]),
    "no recent token": ({"recent_tokens": 0}, ["toptheta.recent_tokens is 0", "at least 1"]),
    "sinks unset": ({"sink_tokens": None}, ["toptheta.sink_tokens is None"]),
    "group rule": ({"group_keep": "all"}, ["toptheta.group_keep is 'all'", "head | union"]),
    "compensation": ({"compensation": "mean"}, ["toptheta.compensation", "none | vmean"]),
    "implementation": ({"implementation": "cuda"}, ["auto | cpu | triton | reference"]),
    "unhashable": ({"implementation": ["cpu"]}, ["toptheta.implementation is ['cpu']"]),
    "on_missing": ({"on_missing": "ignore"}, ["error | dense"]),
    "policy": ({"policy": "topk"}, ["toptheta.policy is 'topk'", "toptheta | sift"]),
    "a table for sift": (
        {"policy": "sift", "thresholds": "t.yaml"},
        ["toptheta.thresholds is 't.yaml'", "toptheta.policy is 'sift'", "no threshold table"],
    ),
    "a screen for sift": (
        {"policy": "sift", "k_screen": "int4"},
        ["toptheta.k_screen is 'int4'", "Leave k_screen out"],
    ),
    "a screen that is gone": (
        {"k_screen": "int8"},
        ["toptheta.k_screen is 'int8', which is gone", '"int4+4" on CPUs', '"int4" on GPUs'],
    ),
    "no such screen": ({"k_screen": "int2"}, ["toptheta.k_screen is 'int2'", "auto | off | int4 | int4+4"]),
    "nothing to screen": (
        {"thresholds": "none", "k_screen": "int4"},
        ['toptheta.k_screen is "int4"', "nothing to screen"],
    ),
    "margin of no screen": (
        {"k_screen": "off", "k_screen_margin": "hard"},
        ["toptheta.k_screen_margin is 'hard'", 'toptheta.k_screen is "off"', "Leave k_screen_margin out"],
    ),
    "margin of a screen that may not be": (
        {"k_screen_margin": 4},
        ["toptheta.k_screen_margin is 4", 'toptheta.k_screen is "auto"', "Leave k_screen_margin out"],
    ),
    "margin below none": (
        {"k_screen": "int4", "k_screen_margin": -0.5},
        [
            "toptheta.k_screen_margin is -0.5 (float)",
            'a number from 0 to 1000 (standard deviations), or "hard"',
        ],
    ),
    "margin is a word": (
        {"k_screen": "int4", "k_screen_margin": "soft"},
        ["toptheta.k_screen_margin is 'soft'"],
    ),
    "margin is true": ({"k_screen": "int4", "k_screen_margin": True}, ["toptheta.k_screen_margin is True"]),
    "margin is endless": (
        {"k_screen": "int4", "k_screen_margin": float("inf")},
        ["toptheta.k_screen_margin is inf"],
    ),
    "margin beyond floats": ({"k_screen": "int4", "k_screen_margin": 10**400}, ["from 0 to 1000"]),
    "a warm-up for a table": (
        {"sift_warmup": 16},
        ["toptheta.sift_warmup is 16", "toptheta.policy is 'toptheta'"],
    ),
    "no warm-up": ({"policy": "sift", "sift_warmup": 1}, ["toptheta.sift_warmup is 1", "from 2 to 4096"]),
    "an endless warm-up": ({"policy": "sift", "sift_warmup": 10**13}, ["from 2 to 4096 (rows)"]),
    "everything is skipped": ({"policy": "sift", "sift_tau": 1.0}, ["toptheta.sift_tau is 1.0", "below 1"]),
    "adapt is a word": ({"adapt": "yes"}, ["toptheta.adapt is 'yes' (str)", "true | false"]),
    "nothing to adapt": (
        {"thresholds": "none", "adapt": True},
        ["toptheta.adapt is true", "nothing to adapt"],
    ),
    "budget of no table": ({"thresholds": "none", "budget": 64}, ["toptheta.budget is 64", "no budgets"]),
    "a budget for sift": (
        {"policy": "sift", "budget": 64},
        ["toptheta.budget is 64", "toptheta.policy is 'sift'", "Leave budget out"],
    ),
    "both names of budget": (
        {"k": 64, "budget": "loss-1%"},
        ["toptheta.k is 64", "toptheta.budget is 'loss-1%'", "Leave k out"],
    ),
    "missing though named": ({"thresholds": "t.yaml", "on_missing": "dense"}, ["on_missing", "Leave one"]),
}


@pytest.mark.parametrize(("section", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_setting_is_refused(section, parts):
    with pytest.raises(ConfigError) as refusal:
        TopThetaConfig.from_additional_config({"toptheta": section})
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("section", [None, "on", 3, ["k"]])
def test_section_must_be_an_object(section):
    with pytest.raises(ConfigError, match="an object is expected"):
        TopThetaConfig.from_additional_config({"toptheta": section})


@pytest.mark.parametrize("value", [128, "loss-1%", None])
def test_k_is_still_taken_for_budget_and_said_once(value, caplog, monkeypatch):
    # vLLM, once imported, keeps its loggers' records to itself.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    _warn_of_k.cache_clear()
    section = {"k": value, "sink_tokens": 4}
    with caplog.at_level(logging.WARNING):
        found = [TopThetaConfig.from_additional_config({"toptheta": section}) for _ in range(3)]
    assert found == 3 * [TopThetaConfig(budget=value, sink_tokens=4)]
    (record,) = set(caplog.records)
    assert f"write {json.dumps({'toptheta': {'budget': value}})}" in record.getMessage()
    assert section == {"k": value, "sink_tokens": 4}


def test_budget_is_taken_without_a_word(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert TopThetaConfig.from_additional_config({"toptheta": {"budget": 64}}).budget == 64
    assert not caplog.messages


VALID = st.fixed_dictionaries(
    {},
    optional={
        "thresholds": st.none() | st.text(min_size=1).filter(lambda name: name != "none"),
        "budget": st.none()
        | st.integers(min_value=1)
        | st.text(min_size=1).filter(lambda name: not name.isdigit()),
        "min_seq_len": st.integers(min_value=0),
        "sink_tokens": st.integers(min_value=0),
        "recent_tokens": st.integers(min_value=1),
        "adapt": st.booleans(),
        "group_keep": st.sampled_from(["head", "union"]),
        "compensation": st.sampled_from(["none", "vmean"]),
        "implementation": st.sampled_from(["auto", "cpu", "triton", "reference"]),
        "k_screen": st.sampled_from(["auto", "off", "int4", "int4+4"]),
    },
)
ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@settings(deadline=None)
@given(VALID)
def test_every_valid_section_is_taken_as_it_is(section):
    config = TopThetaConfig.from_additional_config({"toptheta": section})
    assert {key: asdict(config)[key] for key in section} == section


@settings(deadline=None)
@given(st.sampled_from(sorted(asdict(TopThetaConfig()))), ANYTHING)
@example("sift_tau", 0.95)
@example("sift_warmup", 32)
def test_any_value_is_taken_or_refused_by_name(key, value):
    with nullcontext() if is_valid(key, value) else pytest.raises(ConfigError, match=rf"toptheta\.{key} is"):
        assert getattr(TopThetaConfig.from_additional_config({"toptheta": {key: value}}), key) == value


def is_valid(key: str, value: object) -> bool:
    """Says in the test's own words what each setting allows."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key == "thresholds":
        return value is None or (isinstance(value, str) and value != "")
    if key == "budget":
        named = isinstance(value, str) and value != "" and not value.isdigit()
        return value is None or (whole and value >= 1) or named
    if key == "k_screen_margin":
        return value == 2.5  # any other needs a screen too
    if key == "sift_tau":
        return value == 0.95  # any other needs policy sift too
    if key == "sift_warmup":
        return value == 32 and whole  # the same
    if key in ("adapt", "per_layer_metrics"):
        return isinstance(value, bool)
    if key in ("min_seq_len", "sink_tokens", "recent_tokens"):
        return whole and value >= (key == "recent_tokens")
    return False


@settings(deadline=None)
@given(st.text())
def test_any_other_key_is_refused(key):
    if key not in {*asdict(TopThetaConfig()), "k"}:
        with pytest.raises(ConfigError, match="is not a setting"):
            TopThetaConfig.from_additional_config({"toptheta": {key: 1}})
