"""A calibration run: checks, one pass over the calibration sequences, one over the held-back one, the table."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

from topt_vllm.calibration.capture import Observer, captured
from topt_vllm.calibration.model import (
    Subject,
    check_device,
    examine,
    load_model,
    load_tokenizer,
)
from topt_vllm.calibration.options import ROWS_PER_LENGTH, CalibrationError, CalibrationOptions
from topt_vllm.calibration.quality import HeldBackQuality
from topt_vllm.calibration.scores import LayerCall
from topt_vllm.calibration.statistics import KthScoreMoments, RowSample, kth_scores, sample_rows
from topt_vllm.calibration.texts import Sequences, cut_sequences, read_texts
from topt_vllm.thresholds import (
    SCHEMA_VERSION,
    Budget,
    LayerThresholds,
    Producer,
    Provenance,
    Quality,
    TextSource,
    ThresholdTable,
    refuse_overwrite,
)
from topt_vllm.version import __version__


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and can start.

    Attributes:
        options: As asked.
        subject: The model and what follows from it.
        sequences: Tokens.
        sources: Where the tokens came from.
    """

    options: CalibrationOptions
    subject: Subject
    sequences: Sequences
    sources: list[TextSource]


def prepare(options: CalibrationOptions) -> Plan:
    """Everything that can fail without the weights.

    Raises:
        CalibrationError: An option, the model or the text can't be used.
        FileExistsError: The output exists and may not be replaced.
    """
    refuse_overwrite(options.output, options.force)
    _check_output_folder(options)
    check_device(options.device)
    subject = examine(options)
    tokens = (options.num_samples + 1) * subject.max_seq_length
    documents, sources = read_texts(options.dataset, tokens)
    tokenizer = load_tokenizer(options.model)
    sequences = cut_sequences(tokenizer, documents, options.num_samples, subject.max_seq_length)
    return Plan(options, subject, sequences, sources)


def calibrate(plan: Plan) -> ThresholdTable:
    """Runs the plan; shows its progress on stderr.

    Raises:
        CalibrationError: The weights can't be loaded, or the model's scores can't be used.
    """
    model = load_model(plan.options)
    generator = torch.Generator().manual_seed(plan.options.seed)
    total = (plan.options.num_samples + 1) * len(plan.subject.full_layers)
    with tqdm(total=total, desc="calibrating", unit="layer") as bar:
        moments = _collect(model, plan, generator, bar.update)
        budgets = [_budget(plan, moments, index) for index in range(len(plan.options.ks))]
        table = _table(plan, str(model.dtype).removeprefix("torch."), model.device.type, budgets)
        bar.set_description("measuring on held-back text")
        qualities = _measure(model, plan, table, generator, bar.update)
    measured = [
        budget.model_copy(update={"quality": quality})
        for budget, quality in zip(table.budgets, qualities, strict=True)
    ]
    return table.model_copy(update={"budgets": measured})


def _check_output_folder(options: CalibrationOptions) -> None:
    folder = options.output.resolve().parent
    if not folder.is_dir():
        raise CalibrationError(f"--output {options.output}: the folder {folder} does not exist")
    if options.output.is_dir():
        raise CalibrationError(f"--output {options.output} is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise CalibrationError(f"--output {options.output}: the folder {folder} can't be written to")


def _collect(
    model: Any, plan: Plan, generator: torch.Generator, progress: Callable[[], object]
) -> dict[int, KthScoreMoments]:
    options, subject = plan.options, plan.subject
    moments = {
        layer: KthScoreMoments(len(options.ks), subject.identity.num_query_heads, subject.lengths)
        for layer in subject.full_layers
    }
    for sequence in plan.sequences.calibration:
        sample = sample_rows(subject.lengths, generator)

        def observe(call: LayerCall, sample: RowSample = sample) -> None:
            moments[call.layer].add(sample, kth_scores(call, sample.rows, options.ks))
            progress()

        _run(model, plan, sequence, observe)
    return moments


def _run(model: Any, plan: Plan, sequence: list[int], observe: Observer) -> None:
    """One forward pass; every full-attention layer must have been seen, or thresholds would be missing."""
    seen: list[int] = []

    def counted(call: LayerCall) -> None:
        seen.append(call.layer)
        observe(call)

    options, subject = plan.options, plan.subject
    top_k = options.ks[-1] if options.topk_at_calibration else None
    tokens = torch.tensor([sequence], device=model.device)
    with torch.inference_mode(), captured(model, subject.identity, counted, top_k, subject.dense_layers):
        model(input_ids=tokens, use_cache=False)
    if seen != subject.full_layers:
        raise CalibrationError(
            f"{options.model}: its configuration has the full-attention layers {subject.full_layers}, "
            f"but layers {seen} called the AttentionInterface; this architecture can't be calibrated"
        )


def _budget(plan: Plan, moments: dict[int, KthScoreMoments], index: int) -> Budget:
    layers = []
    for layer in plan.subject.full_layers:
        law, theta = moments[layer].fit(index, plan.options.sigma).rounded()
        layers.append(LayerThresholds(layer=layer, law=law, theta=theta))
    return Budget(
        k=plan.options.ks[index], dense_layers=plan.subject.dense_layers, quality=None, layers=layers
    )


def _measure(
    model: Any,
    plan: Plan,
    table: ThresholdTable,
    generator: torch.Generator,
    progress: Callable[[], object],
) -> list[Quality]:
    subject = plan.subject
    sample = sample_rows(subject.lengths, generator)
    # Below the first calibrated length everything is kept, so there is nothing to measure.
    rows = sample.rows[sample.rows + 1 >= subject.lengths[0]]
    collectors = [
        HeldBackQuality(subject.identity, budget.k, table.thetas(budget), rows, subject.window)
        for budget in table.budgets
    ]

    def observe(call: LayerCall) -> None:
        here = rows.to(call.query.device)
        for part in call.chunks(here):
            scores = call.scores(here[part])
            probabilities = torch.softmax(scores, dim=-1)
            for collector in collectors:
                collector.add(call.layer, scores, probabilities, here[part], part)
        progress()

    _run(model, plan, plan.sequences.held_back, observe)
    return [collector.result(len(plan.sequences.held_back)) for collector in collectors]


def _table(plan: Plan, dtype: str, device: str, budgets: list[Budget]) -> ThresholdTable:
    options, subject = plan.options, plan.subject
    return ThresholdTable(
        schema_version=SCHEMA_VERSION,
        producer=Producer(name="topt-vllm", version=__version__),
        model=subject.identity,
        calibration=Provenance(
            data=plan.sources,
            num_samples=options.num_samples,
            tokens=options.num_samples * subject.max_seq_length,
            max_seq_length=subject.max_seq_length,
            seed=options.seed,
            options={
                "sigma": options.sigma,
                "topk_at_calibration": options.ks[-1] if options.topk_at_calibration else None,
                "rows_per_length": ROWS_PER_LENGTH,
                "dtype": dtype,
                "device": device,
            },
            libraries={name: version(name) for name in ("torch", "transformers")},
            date=_today(),
        ),
        lengths=subject.lengths,
        budgets=budgets,
    )


def _today() -> str:
    """ISO date in UTC; SOURCE_DATE_EPOCH makes it reproducible."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
