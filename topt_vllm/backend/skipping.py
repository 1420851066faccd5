"""Whether a server will skip rows at all; where it will not, nobody should find out by its speed."""

import logging
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from topt_vllm.backend.resolved import Resolved
from topt_vllm.table.search import chooses_no_table

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.topt_vllm")


def warn_if_nothing_is_skipped(resolved: Resolved, vllm_config: "VllmConfig") -> None:
    """Says so in the log, with every reason; once in a process, for each metadata builder comes here."""
    if reasons := "; ".join(why_nothing_is_skipped(resolved, vllm_config)):
        _warn(f"TOPTHETA will skip no V rows: {reasons}")


@cache
def _warn(text: str) -> None:
    logger.warning(text)


def why_nothing_is_skipped(resolved: Resolved, vllm_config: "VllmConfig") -> Iterator[str]:
    """Every reason why no row of this server can be skipped; none where some may be."""
    config, model_config = resolved.config, vllm_config.model_config
    longest = model_config.max_model_len
    contexts = f"contexts have at most {longest} tokens (--max-model-len)"
    if model_config.runner_type == "pooling":
        yield "--runner pooling decodes nothing"
    if not resolved.see_all:
        yield f"no layer attends to more than a window of its context, and {contexts}"
    elif config.sift is None:
        yield from _without_thresholds(resolved, contexts)
    shortest = min((int(thetas.lengths[0]) for thetas in resolved.thetas.values()), default=0)
    if shortest > longest:
        yield f"the table has thresholds from {shortest} tokens on, and {contexts}"
    kept = {
        "min_seq_len": config.min_seq_len,
        "sink_tokens and recent_tokens together": config.sink_tokens + config.recent_tokens,
        "sift_warmup": config.sift_warmup if config.sift is not None else 0,
    }
    for name, tokens in kept.items():
        if tokens >= longest:
            yield f"toptheta.{name} is {tokens}, and {contexts}"


def _without_thresholds(resolved: Resolved, contexts: str) -> Iterator[str]:
    labels = resolved.table_labels
    if chooses_no_table(resolved.config):
        yield 'thresholds "none" was asked for'
    elif labels["name"] == "none":
        yield "there is no threshold table"
    elif not resolved.thetas:
        yield f"budget {labels['budget']} of {labels['name']} has dense layers alone"
    elif not set(resolved.see_all) & set(resolved.thetas):
        yield f"all layers with thresholds attend to a window, and {contexts}"
