"""Who the table is for, where it comes from, and what each budget was measured to do."""

from collections.abc import Callable

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Columns, Section, Table
from topt_vllm.table.schema import Budget, Quality, ThresholdTable
from topt_vllm.table.words import budget_in_words, layers_in_words


def facts(table: ThresholdTable) -> list[tuple[str, str]]:
    """Names and values for the head of the page."""
    model, origin = table.model, table.calibration
    versions = [f"{table.producer.name} {table.producer.version}"]
    versions += [f"{name} {version}" for name, version in origin.libraries.items()]
    return [
        (
            "Model",
            model.id + (f" at {model.revision}" if model.revision else "") + f" ({model.architecture})",
        ),
        (
            "Shape",
            f"{model.layers_text()}; {model.num_query_heads} query heads, {model.num_kv_heads} KV heads, "
            f"head size {model.head_dim}",
        ),
        ("Fingerprint", model.fingerprint),
        ("Calibrated", f"{origin.date} by {', '.join(versions)}"),
        ("On", ", ".join(source.name for source in origin.data)),
        (
            "Sequences",
            f"{origin.num_samples} of up to {numbers.tokens(origin.max_seq_length)} tokens, "
            f"{numbers.tokens(origin.tokens)} tokens in all; seed {origin.seed}",
        ),
        ("Options", ", ".join(f"{name} {value}" for name, value in origin.options.items())),
        (
            "Lengths",
            f"{', '.join(map(numbers.tokens, table.lengths))} tokens; every row is read below the first, "
            "the fitted law holds beyond the last",
        ),
        (
            "Budgets",
            ", ".join(budget_in_words(budget.key) for budget in table.budgets)
            + f"; the default is {budget_in_words(table.budget(None).key)}",
        ),
    ]


def quality(inputs: Inputs) -> Section:
    """Every budget's measured quality."""
    table = inputs.table
    measured = [budget.quality for budget in table.budgets if budget.quality is not None]
    intro = "The calibrator measured each budget on text held back from calibration."
    if measured:
        intro += (
            f" It had {numbers.tokens(measured[-1].tokens)} tokens, of which the last "
            f"{numbers.tokens(measured[-1].rows)} were decoded sparsely. Loss is the rise of perplexity over dense "
            "attention; kept/k is keys kept over keys asked for."
        )
    return Section(
        key="quality",
        title="Quality by budget",
        intro=intro,
        finding=_finding(table.budget(None)),
        tables=[Table.of("Budgets of the table; the last one is the default", table.budgets, _COLUMNS)],
    )


def _finding(budget: Budget) -> str:
    found = budget.quality
    if found is None:
        return f"The default budget {budget_in_words(budget.key)} was not measured: no text was held back."
    return (
        f"The default budget {budget_in_words(budget.key)} reads {numbers.share(found.v_rows_read)} of V rows, "
        f"loses {numbers.rise(found.loss_pct)} of perplexity, keeps {numbers.share(found.agreement)} of the most "
        "likely next tokens on held-back text."
    )


def _measured(cell: Callable[[Quality], str], otherwise: str = numbers.NOTHING) -> Callable[[Budget], str]:
    return lambda budget: cell(budget.quality) if budget.quality is not None else otherwise


_COLUMNS: Columns = (
    ("Budget", lambda budget: budget_in_words(budget.key)),
    ("Loss", _measured(lambda found: numbers.rise(found.loss_pct), "not measured")),
    ("V rows read", _measured(lambda found: numbers.share(found.v_rows_read))),
    ("KL, nats", _measured(lambda found: numbers.plain(found.kl, 4))),
    ("Same next token", _measured(lambda found: numbers.share(found.agreement))),
    ("Dropped mass", _measured(lambda found: numbers.share(found.dropped_mass))),
    ("kept/k p5", _measured(lambda found: numbers.plain(getattr(found.kept_over_k, "p5", None)))),
    ("p50", _measured(lambda found: numbers.plain(getattr(found.kept_over_k, "p50", None)))),
    ("p95", _measured(lambda found: numbers.plain(getattr(found.kept_over_k, "p95", None)))),
    ("Dense layers", lambda budget: layers_in_words(budget.dense_layers)),
)
