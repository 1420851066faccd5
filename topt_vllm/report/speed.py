"""Speed: one decode call and the whole engine against vLLM's own kernel."""

import json
import math
from collections.abc import Sequence

from markupsafe import Markup

from topt_vllm.report import numbers
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.parts import Columns, Figure, Key, Section, Table
from topt_vllm.report.records import Decoded, Served
from topt_vllm.report.svg import WIDTH, Scale, picture, tag, text
from topt_vllm.table.words import budget_in_words

_COMMANDS = {
    "decode": "topt-vllm bench decode --batch 1 8 --seq-lens 2048 8192 --keep 1.0 0.1 --json B.json",
    "serve": "topt-vllm bench serve --model MODEL_FOLDER --dataset TEXT.txt --json S.json",
}
_ROW, _TOP = 34.0, 24.0


def speed(inputs: Inputs) -> Section:
    """Bars of decode calls, and tables of both."""
    cases, engines = inputs.decoded, inputs.served
    absent = [name for name, found in (("decode", cases), ("serve", engines)) if not found]
    split = [case for case in cases if case.ratio_platform is not None and case.ratio_keep_all != 1]
    tables = Table.of("Decode calls", cases, _CALLS), Table.of("The whole engine, medians", engines, _ENGINES)
    findings = [*([_engines_said(engines)] if engines else []), *([_calls_said(split)] if split else [])]
    return Section(
        key="speed",
        title="Speed",
        intro="Times against vLLM's own kernel on the same cache, in the same process; outputs were checked first. "
        "The kernel's share is what remains with every row read (θ = −inf), the rest comes from skipping; the two "
        "multiply.",
        finding=" ".join(findings) or None,
        legend=_legend() if split else [],
        figures=[_bars(split)] if split else [],
        tables=[table for table in tables if table.rows],
        missing=f"No {' and no '.join(_NAMES[name] for name in absent)} yet. With --bench FILE.json, written by:"
        if absent
        else None,
        command="\n".join(_COMMANDS[name] for name in absent) or None,
    )


_NAMES = {"decode": "decode call", "serve": "whole engine"}


def _kernel(case: Decoded) -> float | None:
    """Ratio to the platform's kernel with every row read."""
    return case.ratio_platform / case.ratio_keep_all if case.ratio_platform is not None else None


def _name(case: Decoded) -> str:
    aim = budget_in_words(case.k) if case.k is not None else f"{100 * case.keep_target:g}\u00a0% kept"
    screen = "" if case.k_screen == "off" else f", K screen {case.k_screen}"
    ragged = case.lengths is not None and "+" in case.lengths
    batch = case.lengths if ragged else f"{case.batch} × {numbers.tokens(case.seq_len)}"
    return f"{batch}, {aim}{screen}"


def _calls_said(cases: Sequence[Decoded]) -> str:
    """All cases, not the best one: times of single calls scatter."""
    whole = numbers.span(case.ratio_platform or 1 for case in cases)
    return (
        f"Decode calls that skip V rows ({len(cases)} measured) are {whole} as fast as vLLM's own kernel: "
        f"{numbers.span(_kernel(case) or 1 for case in cases)} from the kernel, "
        f"{numbers.span(case.ratio_keep_all for case in cases)} from skipping."
    )


def _engines_said(engines: Sequence[Served]) -> str:
    loads = "; ".join(
        f"{served.settings.concurrency} requests of {numbers.tokens(served.settings.prompt_tokens)} tokens decode "
        f"{numbers.times(served.ratio_decode)} as fast as with {served.settings.platform_backend}"
        for served in engines
    )
    return f"In the whole engine, {loads}."


def _case_said(case: Decoded) -> str:
    return (
        f"{_name(case)}: {numbers.times(case.ratio_platform)}, {numbers.times(_kernel(case))} from the kernel and "
        f"{numbers.times(case.ratio_keep_all)} from skipping."
    )


def _legend() -> list[Key]:
    def swatch(style: int) -> Markup:
        return picture(16, "", [tag("rect", x=1, y=4, width=14, height=8, class_=f"bar s{style}")], width=16)

    return [Key(swatch(3), "from the kernel (θ = −inf)"), Key(swatch(0), "from skipping")]


def _bars(cases: Sequence[Decoded]) -> Figure:
    """Two bars per case on a logarithmic axis, the second where the first ends: ratios multiply as lengths add."""
    ends = [end for case in cases for end in (_kernel(case) or 1.0, case.ratio_platform or 1.0)]
    axis = Scale(min(0.9, *ends) / 1.05, max(2.0, *ends) * 1.1, 8, WIDTH - 12, math.log10)
    bottom = _TOP + _ROW * len(cases)
    parts = [text(2, 12, "times as fast as vLLM's own kernel", class_="name")]
    for value in axis.ticks(30):
        at = axis(value)
        parts.append(tag("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="zero" if value == 1 else "grid"))
        parts.append(text(at, bottom + 14, f"{numbers.tick(value)}×", "middle"))
    for index, case in enumerate(cases):
        parts += _bar(axis, case, _TOP + index * _ROW)
    label = "Bars. " + " ".join(map(_case_said, cases))
    return Figure(picture(bottom + 20, label, parts), "Decode calls: batch × context, what is kept")


def _bar(axis: Scale, case: Decoded, top: float) -> list[Markup]:
    kernel, total = _kernel(case) or 1.0, case.ratio_platform or 1.0
    parts = []
    for start, end, style, y in ((1.0, kernel, 3, top + 17), (kernel, total, 0, top + 22)):
        left, right = sorted((axis(start), axis(end)))
        parts.append(tag("rect", x=left, y=y, width=max(1.0, right - left), height=5, class_=f"bar s{style}"))
    parts.append(text(8, top + 12, _name(case), class_="label"))
    parts.append(text(WIDTH - 12, top + 12, numbers.times(total), "end", "label"))
    return parts


def _ms(case: Decoded) -> str:
    low, high = numbers.plain(case.ms_p20, 3), numbers.plain(case.ms_p80, 3)
    return f"{numbers.plain(case.ms, 3)} ({low} to {high})"


def _shape(case: Decoded) -> str:
    cache = f"captured from {case.model}" if case.model else "synthetic"
    layers = f", {case.layers} layers" if case.layers > 1 else ""
    device = case.provenance.gpu or f"{case.provenance.threads or '?'} threads"
    return f"{cache}{layers}, {case.heads}/{case.kv_heads} heads of {case.head_dim}, {case.cache_dtype}, {device}"


def _load(served: Served) -> str:
    load = served.settings
    return f"{load.concurrency} × {numbers.tokens(load.prompt_tokens)} + {load.max_tokens} tokens"


_CALLS: Columns = (
    ("Batch × context", _name),
    ("V rows read", lambda case: numbers.share(case.v_rows_read)),
    ("ms (p20 to p80)", _ms),
    ("vLLM's, ms", lambda case: numbers.plain(case.ms_platform, 3)),
    ("Times as fast", lambda case: numbers.times(case.ratio_platform)),
    ("From kernel", lambda case: numbers.times(_kernel(case))),
    ("From skipping", lambda case: numbers.times(case.ratio_keep_all)),
    ("Shape", _shape),
)
_ENGINES: Columns = (
    ("Load", _load),
    ("Settings", lambda served: json.dumps(served.settings.toptheta, ensure_ascii=False)),
    ("Tokens/s", lambda served: numbers.plain(served.toptheta.decode_tokens_per_second, 1)),
    ("vLLM's", lambda served: numbers.plain(served.platform.decode_tokens_per_second, 1)),
    ("Times as fast", lambda served: numbers.times(served.ratio_decode)),
    ("ms between tokens", lambda served: numbers.plain(served.toptheta.itl_ms_median, 1)),
    ("vLLM's", lambda served: numbers.plain(served.platform.itl_ms_median, 1)),
    ("ms to the first", lambda served: numbers.plain(served.toptheta.ttft_ms_median, 0)),
    ("vLLM's", lambda served: numbers.plain(served.platform.ttft_ms_median, 0)),
)
