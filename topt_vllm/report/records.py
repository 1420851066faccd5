"""What the report reads of the JSON files of ``topt-vllm evaluate`` and ``topt-vllm bench``.

Only the keys that the page shows are named and the rest is ignored: the files have more, and later ones will have
others.
Bounds are here, so that nothing behind them divides by zero or draws to infinity.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from topt_vllm.table.words import budget_in_words

# Percent; nobody wants to read a larger loss.
_MOST = 1e12
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Milliseconds = Annotated[float, Field(gt=0, le=1e12)]
Ratio = Annotated[float, Field(ge=1e-9, le=1e9)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Origin(_Part):
    """Where numbers come from; files of earlier releases lack model and table.

    Attributes:
        command: Command line.
        topt_vllm: Version.
        commit: Of the source tree, where there was one.
        cpu: Processor.
        threads: Of torch.
        gpu: Accelerator, where there is one.
        vllm: Version.
        torch: Version.
        model: Name for people.
        fingerprint: Of the model, see :mod:`topt_vllm.table.identity`.
        table: Path of the threshold table.
        table_sha256: Of its bytes.
    """

    command: str
    topt_vllm: str
    commit: str | None = None
    cpu: str | None = None
    threads: int | None = None
    gpu: str | None = None
    vllm: str | None = None
    torch: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    table: str | None = None
    table_sha256: str | None = None


class NeedleCell(_Part):
    """One hidden fact, under a rule and under dense attention."""

    length: Count
    depth: Share
    retrieved: bool
    exact: bool
    margin: float
    retrieved_dense: bool
    exact_dense: bool
    margin_dense: float


class Evaluated(_Part):
    """One rule at one target or budget, on one text at one context.

    Attributes:
        k_screen: Format of its K screen; files of earlier releases lack it.
        candidates: Share of keys that the screen let through; known for rules of Top-Theta.
        kv_bytes_read: Share of the bytes of K and V that were read; likewise.
        cells: The needle grid; None for anything else.
        task: Name of a task; None for anything else, as what follows.
        exact: Share of its answers that greedy decoding gives.
        exact_dense: The same under dense attention.
        margin: Mean lead of its right answers (nats).
        margin_dense: The same under dense attention.
        judged_by: Which of the two counts.
    """

    text: str
    context: Count
    rule: str
    rows_target: Share | None
    k: int | str | None
    v_rows_read: Share
    loss_pct: float = Field(ge=-100, le=_MOST)
    # Null where there were too few rows for one; in files of earlier releases NaN.
    loss_pct_se: float | None = Field(allow_inf_nan=True)
    kl: float
    agreement: Share
    tokens: Count
    k_screen: str = Field(default="off", max_length=20)
    candidates: Share | None = None
    # Above 1 where a screen lets everything through.
    kv_bytes_read: float | None = Field(default=None, ge=0, le=10)
    cells: Annotated[list[NeedleCell], Field(min_length=1, fail_fast=True)] | None = None
    task: str | None = Field(default=None, max_length=40)
    exact: Share | None = None
    exact_dense: Share | None = None
    margin: float | None = None
    margin_dense: float | None = None
    judged_by: Literal["exact", "margin"] | None = None
    provenance: Origin

    @property
    def error(self) -> float | None:
        """Standard error of the loss, where it is known."""
        known = self.loss_pct_se is not None and 0 <= self.loss_pct_se <= _MOST
        return self.loss_pct_se if known else None

    @property
    def ours(self) -> bool:
        """Whether the rule is Top-Theta or a variant of it."""
        return self.rule.startswith("toptheta")

    @property
    def title(self) -> str:
        """The rule, and its K screen."""
        return self.rule if self.k_screen == "off" else f"{self.rule}, K screen {self.k_screen}"

    @property
    def aim(self) -> str:
        """Its target or budget, for people."""
        if self.rows_target is not None:
            return f"{100 * self.rows_target:g}\u00a0% of V rows"
        return budget_in_words(self.k)


class Decoded(_Part):
    """One case of ``topt-vllm bench decode``.

    Attributes:
        model: Of a captured cache; None for a synthetic one.
        fingerprint: The same.
        lengths: Sequences and their context lengths, ``1x131072+15x4096``; files of earlier releases lack it.
    """

    batch: Count
    seq_len: Count
    lengths: str | None = Field(default=None, max_length=20_000)
    heads: Count
    kv_heads: Count
    head_dim: Count
    layers: Count
    cache_dtype: str
    k: int | str | None
    keep_target: Share
    k_screen: str
    v_rows_read: Share
    ms: Milliseconds
    ms_p20: Milliseconds
    ms_p80: Milliseconds
    ms_platform: Milliseconds | None
    ratio_platform: Ratio | None
    ratio_keep_all: Ratio
    model: str | None = None
    fingerprint: str | None = None
    provenance: Origin


class Side(_Part):
    """One backend under ``topt-vllm bench serve``."""

    decode_tokens_per_second: float = Field(gt=0, le=1e12)
    itl_ms_median: float = Field(ge=0, le=1e12)
    ttft_ms_median: float = Field(ge=0, le=1e12)


class ServeSettings(_Part):
    """How the engine was driven."""

    model: str
    concurrency: Count
    prompt_tokens: Count
    max_tokens: Count
    toptheta: dict[str, Any]
    platform_backend: str


class Served(_Part):
    """The whole of a file of ``topt-vllm bench serve``."""

    platform: Side
    toptheta: Side
    ratio_decode: Ratio
    settings: ServeSettings
    provenance: Origin
