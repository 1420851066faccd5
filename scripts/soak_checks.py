"""What the soak test judges by: answers beside golden ones, counters beside the traffic, memory over time."""

import math
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from soak_traffic import Answer, Prompt

MIB = 1 << 20
# Share of the time in which memory may grow.
_WARM_UP = 1 / 3


@dataclass
class Verdicts:
    """Outcome of comparing answers with golden ones.

    Attributes:
        compared: Answers.
        equal: Of them, those with the golden tokens to the end.
        wrong: One line for each answer that is neither equal nor ends in a near tie.
        largest_gap: Widest gap at a differing token, in logits of the golden run.
        largest_drift: Widest difference of a log-probability before any token differed.
    """

    compared: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)
    largest_gap: float = 0.0
    largest_drift: float = 0.0


def judge(
    answers: Sequence[tuple[int, Answer]], golden: Sequence[Answer], prompts: Sequence[Prompt], noise: float
) -> Verdicts:
    """Compares answers token by token.

    At the first token that differs, the golden run must have rated ours within ``noise`` of its own; what follows
    is another text and is not compared.

    Args:
        answers: Prompt's index and answer.
        golden: By prompt.
        prompts: The prompts.
        noise: Gap of log-probabilities that rounding explains; differences of logits are the same as these.
    """
    verdicts = Verdicts()
    for index, answer in answers:
        verdicts.compared += 1
        problem = _problem(answer, golden[index], prompts[index].max_tokens, noise, verdicts)
        if problem:
            verdicts.wrong.append(f"prompt {index} of {len(prompts[index].ids)} tokens: {problem}")
    return verdicts


def _problem(answer: Answer, golden: Answer, max_tokens: int, noise: float, verdicts: Verdicts) -> str:
    if answer.finish not in ("stop", "length"):
        return f"finish_reason {answer.finish}"
    if answer.finish == "length" and len(answer.tokens) != max_tokens:
        return f"{len(answer.tokens)} tokens instead of {max_tokens}"
    if not all(map(math.isfinite, answer.logprobs)) or min(answer.logprobs) < -100:
        return f"log-probabilities {answer.logprobs}"
    for step, token in enumerate(answer.tokens):
        if step >= len(golden.tokens):
            return f"goes on after the golden answer's {step} tokens"
        if token != golden.tokens[step]:
            return _difference(step, token, golden, noise, verdicts)
        drift = abs(answer.logprobs[step] - golden.logprobs[step])
        verdicts.largest_drift = max(verdicts.largest_drift, drift)
    if len(answer.tokens) < len(golden.tokens):
        return f"ends after {len(answer.tokens)} of {len(golden.tokens)} tokens"
    verdicts.equal += 1
    return ""


def _difference(step: int, token: str, golden: Answer, noise: float, verdicts: Verdicts) -> str:
    rated = golden.tops[step].get(token)
    if rated is None:
        return f"token {step} is {token}, not among the golden run's {len(golden.tops[step])} best"
    gap = golden.logprobs[step] - rated
    verdicts.largest_gap = max(verdicts.largest_gap, gap)
    return "" if gap <= noise else f"token {step} is {token}, {gap:.3f} below the golden one: no near tie"


def counters(url: str) -> dict[str, float]:
    """Sums of the counters of vLLM and the plugin; ``NAME{reason}`` where they have a reason."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    sums: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith(("toptheta:", "vllm:")):
            mode = sample.labels.get("mode", "")
            for name in {sample.name, f"{sample.name}{{{mode}}}" if mode else sample.name}:
                sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def inconsistencies(
    new: dict[str, float], tokens: int, complete: int, layers: int, sparse: bool
) -> list[str]:
    """What in the counters contradicts the traffic.

    Args:
        new: What counters rose by.
        tokens: Tokens that clients received.
        complete: Complete answers to prompts.
        layers: Of the model.
        sparse: Whether a table is in force.
    """

    def get(name: str) -> float:
        return new.get(name, math.nan)

    rows = get("toptheta:decode_rows_total") / layers
    generated = get("vllm:generation_tokens_total")
    requests = get("vllm:request_success_total")
    preempted = new.get("vllm:num_preemptions_total", 0.0)
    # The first token of an answer comes from prefill, so no row decodes it. A prompt whose last chunk is one token,
    # a preempted request and the step that an ended request may still take add a row each.
    least, most = tokens - 3 * requests, generated + 2 * requests + 2 * preempted
    facts = {
        f"0 < V rows read {get('toptheta:v_rows_read_total'):.0f} <= {get('toptheta:v_rows_total'):.0f}": (
            0 < get("toptheta:v_rows_read_total") <= get("toptheta:v_rows_total")
        ),
        "keys kept <= keys": (
            0 < get("toptheta:attention_elements_kept_total") <= get("toptheta:attention_elements_total")
        ),
        f"clients' tokens {tokens} <= generated {generated:.0f}": tokens <= generated,
        f"{least:.0f} <= rows decoded per layer {rows:.0f} <= {most:.0f}": least <= rows <= most,
        f"complete answers {complete} <= requests {requests:.0f}": complete <= requests,
    }
    some_sparse = new.get("toptheta:decode_rows_total{sparse}", 0.0) > 0
    all_read = get("toptheta:v_rows_read_total") == get("toptheta:v_rows_total")
    if sparse:
        facts |= {"some rows are sparse": some_sparse, "some V rows are skipped": not all_read}
        mass, count = get("toptheta:dropped_mass_sum"), get("toptheta:dropped_mass_count")
        facts[f"0 < dropped mass {mass:.0f} < {count:.0f} observations"] = 0 < mass < count
    else:
        facts |= {"no row is sparse": not some_sparse, "every V row is read": all_read}
    return [f"not so: {fact}" for fact, holds in facts.items() if not holds]


class Memory:
    """Resident memory of the processes of a server over time.

    Attributes:
        samples: Seconds, and MiB by process id.
        titles: Of the processes.
    """

    def __init__(self, root: psutil.Process):
        self._root = root
        self.samples: list[tuple[float, dict[int, float]]] = []
        self.titles: dict[int, str] = {}

    def sample(self, now: float) -> None:
        """Adds what the processes hold at ``now`` (seconds)."""
        sizes = {}
        for process in tree(self._root):
            try:
                sizes[process.pid] = process.memory_info().rss / MIB
                self.titles.setdefault(process.pid, " ".join(process.cmdline()).strip())
            except psutil.Error:
                continue
        self.samples.append((now, sizes))

    def slope(self) -> float:
        """MiB per minute of all together, after the warm-up."""
        return _slope([(now, sum(sizes.values())) for now, sizes in self.samples])

    def curve(self) -> list[int]:
        """MiB of all together at the end of each minute."""
        start = self.samples[0][0]
        by_minute = {int((now - start) / 60): sum(sizes.values()) for now, sizes in self.samples}
        return [round(size) for size in by_minute.values()]

    def by_process(self) -> list[str]:
        """A line for each process that lived to the end."""
        lines = []
        for pid, size in self.samples[-1][1].items():
            known = [(now, sizes[pid]) for now, sizes in self.samples if pid in sizes]
            lines.append(f"{self.titles[pid][-40:]}: {size:.0f} MiB, {_slope(known):+.2f} MiB/min")
        return lines


def _slope(samples: Sequence[tuple[float, float]]) -> float:
    start, end = samples[0][0], samples[-1][0]
    times, sizes = zip(
        *[(t, size) for t, size in samples if t >= start + _WARM_UP * (end - start)], strict=True
    )
    return float(np.polyfit(np.array(times) / 60, np.array(sizes), 1)[0]) if len(times) > 1 else 0.0


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and all its descendants, as far as they live."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
