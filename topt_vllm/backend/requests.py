"""Which requests a step's rows belong to, and which have ended; for state that belongs to requests, and for drafts.

vLLM gives a metadata builder a batch without names, and a custom drafter none (0.32). The worker knows both;
TOPTHETA's own (:mod:`topt_vllm.backend.worker`) tells this module. One engine worker per process, so one module's
state.
"""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from topt_vllm.sift import SiftRequests

_runner: Any = None
_tables: WeakSet[SiftRequests] = WeakSet()


def follow(runner: Any) -> None:
    """Takes the process's model runner, of either version that vLLM has."""
    global _runner
    _runner = runner


def runner(who: str) -> Any:
    """The process's model runner.

    Args:
        who: Needs it, for the message.

    Raises:
        RuntimeError: Another worker than TOPTHETA's runs the model.
    """
    if _runner is None:
        raise RuntimeError(
            f"{who} needs TOPTHETA's worker, but --worker-cls names another. Leave --worker-cls out, or do without "
            f"{who}."
        )
    return _runner


def watch(table: SiftRequests) -> None:
    """From now on the table is told which requests have ended."""
    _tables.add(table)


def ended(requests: Iterable[str]) -> None:
    """Forgets requests that have finished or were aborted; preempted ones go on and aren't among them."""
    names = list(requests)
    for table in _tables:
        table.forget(names)


def of_batch(common: Any, count: int) -> list[str] | None:
    """Names of the first ``count`` requests of the batch that is being built, in its order.

    None where rows are nobody's: vLLM warms up with such batches, and ranks of data parallelism that have no
    request take part in the others' steps with them (0.32).

    Raises:
        RuntimeError: Another worker than TOPTHETA's runs the model.
    """
    found = runner("policy sift")
    if common.req_idx is not None:  # vLLM's second model runner keeps requests in a table
        known = found.req_states.index_to_req_id
        names = [known[int(index)] for index in common.req_idx[:count] if int(index) in known]
    else:
        names = list(found.input_batch.req_ids[:count])
    return names if len(names) == count else None
