"""A calibration run: the pass over the calibration sequences, the budgets, their quality, the table."""

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from topt_vllm.calibration.allocation import greedy_path
from topt_vllm.calibration.budgets import curves, measured, targeted
from topt_vllm.calibration.candidates import CandidateShares
from topt_vllm.calibration.collect import collect, collect_errors
from topt_vllm.calibration.key_statistics import key_statistics
from topt_vllm.calibration.maker import Maker
from topt_vllm.calibration.options import ROWS_PER_LENGTH, CalibrationError
from topt_vllm.calibration.partial import Partial
from topt_vllm.calibration.plan import Plan, prepare
from topt_vllm.calibration.search import MAX_RUNS
from topt_vllm.replay.memory import explained
from topt_vllm.replay.model import load_causal_lm
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.scores import LayerCall
from topt_vllm.table.schema import SCHEMA_VERSION, Budget, KeyStatistics, Producer, Provenance, ThresholdTable
from topt_vllm.version import __version__

__all__ = ["Plan", "calibrate", "prepare"]


def calibrate(plan: Plan, write: Callable[[ThresholdTable], None] | None = None) -> ThresholdTable:
    """Runs the plan; shows its progress on stderr. Intermediate results stay beside the output until all is done.

    Args:
        plan: What to do.
        write: Keeps the table; called before intermediate results are removed.

    Raises:
        CalibrationError: The weights can't be loaded, the model's scores can't be used, memory runs out, or another
            process is making the same table; or SOURCE_DATE_EPOCH is no date.
    """
    _today()  # asked once before the work, for it may raise
    partial = Partial(plan)
    options = plan.options
    with explained(plan.max_seq_length, CalibrationError, ". --resume keeps the sequences that were done"):
        model = load_causal_lm(options.model, options.device, options.dtype, options.trust_remote_code)
        # What can't be loaded leaves nothing behind.
        with partial.held():
            try:
                budgets, statistics = _budgets(model, plan, partial)
            except ReplayError:
                # The model's scores can't be used, and a resumed run would see the same.
                partial.remove()
                raise
            dtype, device = str(model.dtype).removeprefix("torch."), model.device.type
            table = _table(plan, dtype, device, budgets, statistics)
            if write is not None:
                write(table)
            partial.remove()
    return table


def _budgets(model: Any, plan: Plan, partial: Partial) -> tuple[list[Budget], KeyStatistics]:
    options, layers = plan.options, len(plan.subject.full_layers)
    with tqdm(total=options.num_samples * layers, desc="calibrating", unit="layer") as bar:
        collected = collect(model, plan, partial, bar.update)
    maker, statistics = Maker(plan, collected.moments), key_statistics(collected.keys, options.seed)
    budgets = [maker.constant(k) for k in options.ks]
    if options.budget == "auto":
        budgets += _targeted_budgets(model, plan, maker, partial, collected.passes)
    length = len(plan.sequences.held_back) - 1
    shares = CandidateShares(plan.subject, length, statistics.transforms(), budgets, plan.lengths)
    with tqdm(total=len(budgets), desc="measuring on held-back text", unit="budget") as bar:
        budgets = measured(model, plan, budgets, bar.update, shares.observe)
    return shares.added_to(budgets), statistics


def _targeted_budgets(
    model: Any, plan: Plan, maker: Maker, partial: Partial, passes: dict[int, list[LayerCall]]
) -> list[Budget]:
    """Allocations for targets, from what skipping does."""
    options, layers = plan.options, len(plan.subject.full_layers)
    with tqdm(total=len(plan.error_sequences) * layers, desc="errors of heads", unit="layer") as bar:
        errors = collect_errors(model, plan, partial, maker.thetas(), passes, bar.update)
    with tqdm(total=len(plan.allocated_layers), desc="sensitivity of layers", unit="layer") as bar:
        path = greedy_path(curves(model, plan, maker, errors, partial, bar.update))
    with tqdm(total=MAX_RUNS * len(options.targets), desc="searching targets", unit="run") as bar:
        return targeted(model, plan, maker, path, bar.update)


def _table(
    plan: Plan, dtype: str, device: str, budgets: list[Budget], statistics: KeyStatistics
) -> ThresholdTable:
    options, subject = plan.options, plan.subject
    return ThresholdTable(
        schema_version=SCHEMA_VERSION,
        producer=Producer(name="topt-vllm", version=__version__),
        model=subject.identity,
        calibration=Provenance(
            data=plan.sources,
            num_samples=options.num_samples,
            tokens=options.num_samples * plan.max_seq_length,
            max_seq_length=plan.max_seq_length,
            seed=options.seed,
            options={
                "budget": options.budget,
                "rows_per_length": ROWS_PER_LENGTH,
                "dtype": dtype,
                "device": device,
            },
            libraries={name: version(name) for name in ("torch", "transformers")},
            date=_today(),
        ),
        lengths=plan.lengths,
        budgets=budgets,
        key_statistics=statistics,
    )


def _today() -> str:
    """ISO date in UTC; SOURCE_DATE_EPOCH makes it reproducible.

    Raises:
        CalibrationError: That is set, and not to a number of seconds.
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or time.time()
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(int(seconds)))
    except (ValueError, OverflowError, OSError) as error:
        raise CalibrationError(
            f"SOURCE_DATE_EPOCH is {seconds!r}; seconds since 1970 are expected, or unset it"
        ) from error
