"""The rules that a text is evaluated under, tuned to their targets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from topt_vllm.evaluation.options import ADAPTING, NO_SCREEN, OURS, SCREENED
from topt_vllm.evaluation.plan import Plan, Text
from topt_vllm.evaluation.rules.adaptive import TopThetaAdapt
from topt_vllm.evaluation.rules.families import families
from topt_vllm.evaluation.rules.toptheta import TopThetaNoMean
from topt_vllm.evaluation.screens import Screen, sampled_shares, screens_of
from topt_vllm.evaluation.tuning import Sample, sample, spread_rows, tune
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.rule import Rule
from topt_vllm.replay.top_theta import TopTheta

# What records say about a rule, in their order; None where a budget of the table stands as it is.
_UNTUNED: dict[str, Any] = dict.fromkeys(
    ("rule", "rows_target", "k", "dense_layers", "parameter", "v_rows_tuned", "tuned_on")
)


@dataclass(frozen=True)
class Job:
    """One rule at one target.

    Attributes:
        facts: What its records say about it, in their words.
        rules: The rule of each layer that isn't dense.
        ks: Keys that each query head should keep, by layer; {} where nothing says so.
    """

    facts: dict[str, Any]
    rules: dict[int, Rule]
    ks: dict[int, list[int]] = field(default_factory=dict)

    def attention(self, plan: Plan, contexts: torch.Tensor) -> RuleAttention:
        """For one run of rows with these contexts, int64 [r]."""
        return RuleAttention(plan.subject, self.rules, contexts, self.ks)


def count_jobs(plan: Plan) -> int:
    """How many jobs a text has at one length."""
    options = plan.options
    tuned, ours = set(options.rules) - {ADAPTING}, set(options.rules) & set(OURS)
    more = len(options.k_screens) - 1 if SCREENED in ours else 0
    return (len(tuned) + more) * len(options.rows) + (len(ours) + more) * len(options.ks)


def jobs_by_length(model: Any, plan: Plan, text: Text, lengths: list[int]) -> dict[int, list[Job]]:
    """Every job at each length, from one dense pass over the text's tuning sequence where something is tuned.

    Rules are tuned for each length by itself, on rows with the contexts that will be decoded.
    """
    if not plan.options.rows:
        return {length: _budget_jobs(plan) for length in lengths}
    wanted = [spread_rows(length - plan.count(length), length) for length in lengths]
    samples = sample(model, plan.subject, text.tuning[: max(lengths)], wanted)
    return {
        length: [*_budget_jobs(plan), *_tuned_jobs(plan, text.tuned_on, found, length)]
        for length, found in zip(lengths, samples, strict=True)
    }


def _budget_jobs(plan: Plan) -> list[Job]:
    """Every budget of the table that was asked for."""
    options = plan.options
    jobs: list[Job] = []
    for k in options.ks:
        budget = plan.table.budget(k)
        thetas, ks = budget.thetas(plan.table.lengths), budget.ks()
        rules: dict[str, Rule] = {"toptheta": TopTheta(thetas), "toptheta-nomean": TopThetaNoMean(thetas)}
        rules[ADAPTING] = TopThetaAdapt(thetas, ks)
        for name in OURS:
            if name in options.rules:
                facts = _UNTUNED | {"rule": name, "k": k, "dense_layers": budget.dense_layers}
                shares = budget.candidates
                jobs += _screened_jobs(plan, facts, rules[name], ks, lambda *_, shares=shares: shares)
    return jobs


def _tuned_jobs(plan: Plan, tuned_on: str, found: Sample, longest: int) -> list[Job]:
    """Every rule at every target."""
    jobs: list[Job] = []
    for target in plan.options.rows:
        dense = plan.dense[target]
        for family in families(plan.options.rules, plan.table, longest):
            tuned = tune(family, target, found, dense)
            facts = _UNTUNED | {
                "rule": family.name,
                "rows_target": target,
                "dense_layers": sorted(dense),
                "parameter": tuned.parameter,
                "v_rows_tuned": tuned.v_rows_read,
                "tuned_on": tuned_on,
            }
            jobs += _screened_jobs(plan, facts, tuned.rule, {}, partial(sampled_shares, found))
    return jobs


def _screened_jobs(
    plan: Plan,
    facts: dict[str, Any],
    rule: Rule,
    ks: dict[int, list[int]],
    shares: Callable[[TopTheta, Screen], Mapping[int, float]],
) -> list[Job]:
    """One for each screen that was asked for; other rules than Top-Theta have none.

    Args:
        plan: The evaluation.
        facts: About the rule at its target.
        rule: Without a screen.
        ks: Keys that each query head should keep.
        shares: From the rule and a screen to the share of candidates by layer.
    """
    options = plan.options
    layers = sorted(set(plan.subject.full_layers) - set(facts["dense_layers"]))
    if facts["rule"] != SCREENED or not isinstance(rule, TopTheta):
        (plain,) = screens_of((NO_SCREEN,), None, plan.table)
        return [Job(facts | plain.facts, dict.fromkeys(layers, rule), ks)]
    screens = screens_of(options.k_screens, options.k_screen_margin, plan.table)
    return [
        Job(facts | screen.facts, screen.rules(rule, layers, shares(rule, screen)), ks) for screen in screens
    ]
