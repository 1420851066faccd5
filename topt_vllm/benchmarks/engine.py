"""The whole engine offline: decode steps of the platform's backend and of TOPTHETA behind cached prompts."""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from topt_vllm.attention.api import IMPLEMENTATIONS
from topt_vllm.benchmarks.cache_size import cache_bytes
from topt_vllm.benchmarks.engine_record import Contender
from topt_vllm.benchmarks.model_shapes import has_weights
from topt_vllm.benchmarks.share_table import budget_name, share_table
from topt_vllm.engines.process import EngineError, ask
from topt_vllm.replay.model import read_config
from topt_vllm.table.file import dump
from topt_vllm.table.identity import ModelIdentity, identify

# θ = −inf as a user sets it.
NONE = "none"
_PROGRAM = ["-m", "topt_vllm.benchmarks.engine_main"]
_TIMEOUT = 3600.0  # seconds; for start-up, prefill and turns of one engine

Ask = Callable[[Sequence[str], dict[str, Any], bool, float], dict[str, Any]]


def our_kernel() -> str:
    """Name of our fastest implementation on this platform."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "triton"


@dataclass(frozen=True)
class EngineBenchmark:
    """What to measure.

    Attributes:
        model: Folder of a model; without weights in it, they are dummies.
        batch: Sequences decoded at once.
        context: Tokens of each prompt.
        tokens: Tokens of each answer, of which all but the first are timed.
        keeps: Shares of V rows to read; 1.0 is θ = −inf in our kernel by name, :data:`NONE` as ``auto`` picks.
        kernel: Our implementation's name on this platform.
        k_screens: Values of ``k_screen``, each for every share.
        first_length: Context length from which thresholds hold (tokens); None for ``context``.
        rounds: How often every engine is started.
        turns: Measurements of each start.
        engine: More arguments of ``vllm.LLM``, for all engines.
    """

    model: Path
    batch: int
    context: int
    tokens: int
    keeps: tuple[float | str, ...]
    kernel: str
    k_screens: tuple[str, ...] = ("off",)
    first_length: int | None = None
    rounds: int = 1
    turns: int = 3
    engine: dict[str, Any] = field(default_factory=dict)

    def run(self, report: Callable[[str], None], ask_engine: Ask = ask) -> dict[str, Any]:
        """Starts the engines one after the other, ``rounds`` times, each in a process of its own.

        Args:
            report: Called with a line when something is done.
            ask_engine: Runs one engine; tests give another.

        Returns:
            ``settings`` and ``engines``, one record each; the platform's is the first.

        Raises:
            ValueError: The model can't decode so many tokens, an argument is the benchmark's own, the kernel has no
                such K screen, or the machine was too busy for a result.
            EngineError: An engine failed.
        """
        settings = self._settings()
        self._check_screens()
        with tempfile.TemporaryDirectory() as folder:
            table = self._find_table(Path(folder), report, ask_engine)
            contenders = self._contenders(table)
            for _ in range(self.rounds):
                for contender in contenders:
                    result = self._ask(ask_engine, contender, self.batch, self.engine, turns=self.turns)
                    contender.results.append(result)
                    report(f"{contender.name}: {_list(contender.steps[-self.turns :])} ms a step")
        for contender in contenders:
            if median(contender.steps) <= 0:
                raise ValueError(
                    f"{contender.name}: {self.tokens} tokens took no longer than one ({_list(contender.steps)} ms "
                    "a step), so other work on this machine decides; ask for more --tokens or --turns, or wait"
                )
        stock = median(contenders[0].steps)
        records = [contender.record(stock, self.batch) for contender in contenders]
        return {"settings": settings, "engines": records}

    def _check_screens(self) -> None:
        """Refuses what an engine would, once others have been timed."""
        implementation = importlib.import_module(IMPLEMENTATIONS[self.kernel])
        for k_screen in self.k_screens:
            if k_screen not in ("off", *implementation.capabilities.screens):
                known = ", ".join(implementation.capabilities.screens)
                raise ValueError(f"--k-screen {k_screen}: the {self.kernel} kernel has {known}")

    @property
    def dummy(self) -> bool:
        """Whether the weights are dummies."""
        return not has_weights(self.model)

    @cached_property
    def _identity(self) -> ModelIdentity:
        """The model's; what can't be measured is refused."""
        config = read_config(str(self.model), bool(self.engine.get("trust_remote_code")))
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.context + self.tokens > longest:
            raise ValueError(
                f"{self.context} tokens of context and {self.tokens} of an answer are more than the {longest} of "
                f"{self.model.name}; ask for fewer"
            )
        clash = sorted(set(self.engine) & {*self._arguments(0, 0), *_OWN})
        if clash:
            raise ValueError(f"{', '.join(clash)} can't be given to the engine: the benchmark sets it itself")
        return identify(config, self.model.name)

    def _contenders(self, table: Path | None) -> list[Contender]:
        contenders = [Contender("platform", None)]
        for keep in self.keeps:
            if keep == NONE:
                contenders.append(Contender("thresholds none, auto", {"thresholds": "none"}))
            elif keep == 1:
                settings = {"thresholds": "none", "implementation": self.kernel}
                contenders.append(Contender(f"every row, {self.kernel}", settings))
            else:
                assert isinstance(keep, float)
                contenders += [self._sparse(str(table), keep, k_screen) for k_screen in self.k_screens]
        return contenders

    def _sparse(self, table: str, keep: float, k_screen: str) -> Contender:
        screen = "" if k_screen == "off" else f", {k_screen}"
        settings = {"thresholds": table, "budget": budget_name(keep), "k_screen": k_screen}
        return Contender(f"{100 * keep:g} % of V rows{screen}", settings)

    def _find_table(self, folder: Path, report: Callable[[str], None], ask_engine: Ask) -> Path | None:
        """Writes a table that reads the shares; None where none needs one."""
        shares = [keep for keep in self.keeps if isinstance(keep, float) and keep < 1]
        if not shares:
            return None
        every_row = Contender("thresholds", {"thresholds": "none", "implementation": self.kernel})
        # What a layer is called with is seen in eager engines only.
        engine = self.engine | {"enforce_eager": True}
        found = self._ask(ask_engine, every_row, 1, engine, keeps=shares)
        first = self.context if self.first_length is None else self.first_length
        table = share_table(self._identity, first, self.tokens, shares, found["thetas"], found["keys"])
        path = folder / "toptheta.yaml"
        dump(table, path)
        report(f"thresholds for {_list([100 * share for share in shares])} % of V rows are found")
        return path

    def _ask(
        self, ask_engine: Ask, contender: Contender, batch: int, engine: dict[str, Any], **wanted: Any
    ) -> dict[str, Any]:
        size = cache_bytes(
            self._identity, batch * (self.context + self.tokens), self.engine.get("dtype", "auto")
        )
        arguments = self._arguments(batch, size) | engine | _toptheta(contender.toptheta)
        sizes = {"batch": batch, "context": self.context, "tokens": self.tokens}
        try:
            return ask_engine(_PROGRAM, {"engine": arguments, **sizes, **wanted}, False, _TIMEOUT)
        except EngineError as error:
            raise EngineError(f"{contender.name}: the engine {error}") from error

    def _arguments(self, batch: int, size: int) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "load_format": "dummy" if self.dummy else "auto",
            "skip_tokenizer_init": True,
            "max_model_len": self.context + self.tokens,
            "max_num_seqs": batch,
            "kv_cache_memory_bytes": size,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "seed": 0,
        }

    def _settings(self) -> dict[str, Any]:
        given = asdict(self) | {"model": self._identity.id, "dummy_weights": self.dummy}
        return {name: value for name, value in given.items() if name not in ("keeps", "kernel", "k_screens")}


# Arguments besides those of every engine, whose values tell the contenders apart or whose counters would be parts.
_OWN = (
    "attention_backend",
    "additional_config",
    "worker_extension_cls",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
)


def _toptheta(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments that choose the backend; without settings vLLM picks its own."""
    if settings is None:
        return {}
    return {"attention_backend": "TOPTHETA", "additional_config": {"toptheta": settings}}


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)
