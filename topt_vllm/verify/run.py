"""The checks in order."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from topt_vllm.engines.process import EngineError
from topt_vllm.verify import installation, plan, verdicts
from topt_vllm.verify.checks import Check, CheckError, attempt
from topt_vllm.verify.engine import Request
from topt_vllm.verify.engine import run as run_engine

# A large model on a slow disk may take minutes to load.
ENGINE_SECONDS = 900.0

Run = Callable[[Request, float], dict[str, Any]]


def verify(
    model: str,
    thresholds: str | None,
    run: Run = run_engine,
    k_screen: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Check]:
    """Makes the checks one by one.

    Args:
        model: Folder or hub id.
        thresholds: Path of the table, ``none`` for θ = −inf, None for the one that a server would find.
        run: Runs one engine; tests give another.
        k_screen: Format of a K screen with which the text is decoded; None for none.
        trust_remote_code: Whether to run code that comes with the model.

    Yields:
        Each check when it is made.
    """
    yield attempt("install", installation.install)
    yield attempt("entry_points", installation.entry_points)
    yield attempt("kernel", installation.kernel)
    found: dict[str, Any] = {}

    def table() -> str:
        found["model"] = plan.read_model(model, trust_remote_code)
        found["table"], words = plan.read_table(found["model"], thresholds, k_screen)
        return words

    check = attempt("table", table)
    yield check
    yield from _dense_checks(found.get("model"), run)
    if not check.passed:
        for name in ("rows_skipped", "loss"):
            yield Check(name, False, "not checked: there is no usable table")
    elif found["table"] is not None:
        yield from _sparse_checks(found["model"], found["table"], thresholds, k_screen, run)


def _dense_checks(model: plan.Model | None, run: Run) -> Iterator[Check]:
    results: dict[str, dict[str, Any]] = {}

    def engines() -> str:
        if model is None:
            raise CheckError("not started: the model can't be read")
        seconds = []
        for name, settings in (("stock vLLM", None), ("TOPTHETA", plan.no_table())):
            started = time.monotonic()
            try:
                results[name] = run(plan.plain_request(model, settings), ENGINE_SECONDS)
            except EngineError as error:
                raise CheckError(f"{name}: {error}") from error
            seconds.append(f"{name} {time.monotonic() - started:.0f} s")
        return f"started and answered: {', '.join(seconds)}"

    yield attempt("engine", engines)
    if len(results) == 2:
        yield attempt("tokens", lambda: verdicts.tokens(results["TOPTHETA"], results["stock vLLM"]))
    else:
        yield Check("tokens", False, "not checked: the engines gave no answers")


def _sparse_checks(
    model: plan.Model, table: Any, thresholds: str | None, k_screen: str | None, run: Run
) -> Iterator[Check]:
    budget = table.budget(None)
    quality = budget.quality
    result: dict[str, Any] = {}

    def rows_skipped() -> str:
        forced = plan.forced_text(model, table)
        result.update(run(plan.forced_request(model, forced, thresholds, k_screen), ENGINE_SECONDS))
        used = f"budget {budget.key}, contexts of {forced.first} to {len(forced.tokens)} tokens"
        return f"{used}: {verdicts.rows_skipped(result['totals'], quality)}"

    yield attempt("rows_skipped", rows_skipped)
    if result:
        promised = None if quality is None else quality.loss_pct
        yield attempt("loss", lambda: verdicts.loss(result["decoded"], result["prefilled"], promised))
    else:
        yield Check("loss", False, "not checked: the engine decoded nothing")
