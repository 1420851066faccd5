"""What a table says, as text for people."""

from topt_vllm.calibration.law import held_out_error
from topt_vllm.table.schema import Budget, Quality, ThresholdTable
from topt_vllm.table.words import budget_in_words, layers_in_words, printable


def describe(table: ThresholdTable) -> str:
    """Identity, origin, budgets and their quality, and the range of θ in each layer."""
    parts = _heading(table), _budgets(table), describe_screen(table), _theta_ranges(table)
    return "\n\n".join("\n".join(map(printable, part)) for part in parts)


def _heading(table: ThresholdTable) -> list[str]:
    model, origin = table.model, table.calibration
    revision = f" at {model.revision}" if model.revision else ""
    texts = ", ".join(source.name for source in origin.data)
    return [
        f"model        {model.id}{revision} ({model.architecture})",
        f"             {model.layers_text()}"
        f"; {model.num_query_heads} query heads, {model.num_kv_heads} KV heads, head_dim {model.head_dim}",
        f"             {model.fingerprint}",
        f"calibrated   {origin.date} by {table.producer.name} {table.producer.version} on {texts}",
        f"             {origin.num_samples} × {origin.max_seq_length} tokens, seed {origin.seed}",
        f"             {', '.join(f'{name} {value}' for name, value in origin.options.items())}",
        f"             {', '.join(f'{name} {value}' for name, value in origin.libraries.items())}",
        f"lengths      {', '.join(map(str, table.lengths))} tokens; dense below, extrapolated above",
    ]


def describe_screen(table: ThresholdTable) -> list[str]:
    """Whether the table serves K screens, and how many keys they let through."""
    if table.key_statistics is None:
        return ["K screen     no statistics of K; topt-vllm calibrate --k-screen-only adds them"]
    layers = len(table.key_statistics.layers)
    lines = [f"K screen     statistics of K in {layers} layers, seed {table.key_statistics.seed}"]
    known = [(budget, candidates) for budget in table.budgets if (candidates := _candidates(budget))]
    if known:
        width = max(len(str(budget.key)) for budget, _ in known)
        lines.append("             candidates at 4 bits and the default margin, in sparse layers:")
        lines += [
            f"             {budget.key:>{width}}  {_spread(candidates)}" for budget, candidates in known
        ]
    return lines


def _candidates(budget: Budget) -> dict[int, float]:
    """Shares by sparse layer."""
    sparse = {entry.layer for entry in budget.layers} - {*budget.dense_layers}
    return {layer: share for layer, share in budget.candidates.items() if layer in sparse}


def _spread(shares: dict[int, float]) -> str:
    worst = max(shares, key=lambda layer: shares[layer])
    return f"{sum(shares.values()) / len(shares):.1%}, at most {shares[worst]:.1%} in layer {worst}"


def _budgets(table: ThresholdTable) -> list[str]:
    width = max(6, *(len(str(budget.key)) for budget in table.budgets))
    lines = [
        f"{'budget':>{width}}  {'kept/k p5':>9} {'p50':>5} {'p95':>5}  {'V rows read':>11}  {'dropped mass':>12}  "
        f"{'loss':>7}  {'agreement':>9}  dense layers"
    ]
    for budget in table.budgets:
        lines.append(
            f"{budget.key:>{width}}  {_quality(budget.quality)}  {layers_in_words(budget.dense_layers)}"
        )
    tokens = next((budget.quality.tokens for budget in table.budgets if budget.quality), None)
    if tokens is not None:
        lines.append(f"        (on {tokens} held-back tokens; kept/k and dropped mass in sparse layers only)")
    return lines + _law(table)


def _law(table: ThresholdTable) -> list[str]:
    errors = {budget.key: held_out_error(budget, table.lengths) for budget in table.budgets}
    known = [
        f"{key}: {error[0]:.2f} (p95 {error[1]:.2f})" for key, error in errors.items() if error is not None
    ]
    if not known:
        return []
    return [
        f"        θ at {table.lengths[-1]} from the law of the shorter lengths is off by, rms in scaled logits:",
        f"        {', '.join(known)}",
    ]


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return f"{'not measured':<66}"
    spread = quality.kept_over_k
    kept = f"{'–':>9} {'–':>5} {'–':>5}"
    if spread is not None:
        kept = f"{spread.p5:>9.2f} {spread.p50:>5.2f} {spread.p95:>5.2f}"
    loss, read, dropped = f"{quality.loss_pct:+.2f}%", quality.v_rows_read, quality.dropped_mass
    return f"{kept}  {read:>11.1%}  {dropped:>12.1%}  {loss:>7}  {quality.agreement:>9.1%}"


def _theta_ranges(table: ThresholdTable) -> list[str]:
    lines = [
        "θ over query heads and lengths",
        " layer" + "".join(f"{budget_in_words(budget.key):>18}" for budget in table.budgets),
    ]
    for position, entry in enumerate(table.budgets[0].layers):
        ranges = "".join(f"{_range(budget, position):>18}" for budget in table.budgets)
        lines.append(f"{entry.layer:>6}{ranges}")
    return lines


def _range(budget: Budget, position: int) -> str:
    numbers = [number for row in budget.layers[position].theta for number in row]
    return f"{min(numbers):.2f} … {max(numbers):.2f}"
