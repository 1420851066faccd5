"""The whole engine: ``vllm serve`` with the backend that it picks and with TOPTHETA, in turns, same prompts."""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from topt_vllm.attention.api import load_implementation, require
from topt_vllm.benchmarks.cache_size import cache_bytes
from topt_vllm.benchmarks.client import Measurement, request_all, summarise
from topt_vllm.benchmarks.server import picked_backend, serve
from topt_vllm.config import TopThetaConfig
from topt_vllm.replay.model import load_tokenizer, read_config
from topt_vllm.table.command import lacks_key_statistics
from topt_vllm.table.identity import identify
from topt_vllm.table.search import find_table


@dataclass(frozen=True)
class ServeBenchmark:
    """What to measure.

    Attributes:
        model: Folder or hub id.
        text: Source of the prompts; each request takes its own stretch.
        concurrency: Requests sent at once.
        prompt_tokens: Tokens of each prompt.
        max_tokens: Tokens of each answer.
        rounds: How often both are served.
        toptheta: The plugin's settings.
        dtype: Of both servers, as vLLM names it.
        trust_remote_code: Whether to run code that comes with the model.
        speculative: vLLM's speculative configuration of TOPTHETA's server; the other one drafts nothing.
    """

    model: str
    text: str
    concurrency: int
    prompt_tokens: int
    max_tokens: int
    rounds: int
    toptheta: dict[str, Any]
    dtype: str = "bfloat16"
    trust_remote_code: bool = False
    speculative: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuses what TOPTHETA's server would refuse; the platform's is measured before it starts.

        Raises:
            ValueError: The model can't be read or has a shorter context, or settings or table can't be used.
            RuntimeError: The kernel can't run here.
        """
        config = TopThetaConfig.from_additional_config({"toptheta": self.toptheta})
        model = read_config(self.model, self.trust_remote_code)
        longest = getattr(model.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.prompt_tokens + self.max_tokens > longest:
            raise ValueError(
                f"--prompt-tokens {self.prompt_tokens} and --max-tokens {self.max_tokens} are more than the "
                f"model's context of {longest} tokens; ask for fewer"
            )
        implementation = load_implementation(config.implementation, current_platform.device_type)[1]
        require(implementation, screen=config.screen)
        if config.sift is not None:
            return
        found = find_table(config, identify(model, self.model), self.model, None)
        if found:
            found[0].budget(config.budget)
        if config.screen is not None and found and found[0].key_statistics is None:
            raise ValueError(f"k_screen is {config.screen}, but {lacks_key_statistics(self.model, found[1])}")

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Serves both backends ``rounds`` times in turns.

        Args:
            report: Called with a line per measurement.

        Returns:
            ``platform`` and ``toptheta`` (medians and every round), ``ratio_decode`` and the settings.
        """
        options = self._options()
        prompts = self._prompts()
        measured: dict[str, list[Measurement]] = {"platform": [], "toptheta": []}
        backends: dict[str, str] = {}
        for round_number in range(self.rounds):
            for name in measured:
                result, backends[name] = self._measure(name, prompts, options)
                measured[name].append(result)
                report(
                    f"round {round_number + 1}, {name}: {result.decode_tokens_per_second:.1f} tokens/s, "
                    f"{result.itl_ms_median:.1f} ms between tokens, {result.ttft_ms_median:.0f} ms to the first; "
                    f"{result.tokens} tokens in {result.seconds:.1f} s in which all decode"
                )
        outcome: dict[str, Any] = {name: _median(results) for name, results in measured.items()}
        ratio = (
            outcome["toptheta"]["decode_tokens_per_second"] / outcome["platform"]["decode_tokens_per_second"]
        )
        settings = asdict(self) | {
            "text": f"{len(self.text)} characters",
            "platform_backend": backends["platform"],
        }
        return outcome | {"ratio_decode": ratio, "settings": settings}

    def _prompts(self) -> list[list[int]]:
        tokenizer = load_tokenizer(self.model, self.trust_remote_code)
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        needed = self.concurrency * self.prompt_tokens
        if len(ids) < needed:
            raise ValueError(
                f"the text has {len(ids)} tokens; {needed} are needed for different prompts. Add text, or lower "
                "--concurrency or --prompt-tokens"
            )
        return [ids[start : start + self.prompt_tokens] for start in range(0, needed, self.prompt_tokens)]

    def _options(self) -> list[str]:
        """Of both servers."""
        context = self.prompt_tokens + self.max_tokens
        identity = identify(read_config(self.model, self.trust_remote_code), self.model)
        size = cache_bytes(identity, self.concurrency * context, self.dtype)
        options = ["--dtype", self.dtype, "--max-model-len", str(context), "--no-enable-prefix-caching"]
        options += ["--trust-remote-code"] if self.trust_remote_code else []
        return [*options, "--max-num-seqs", str(self.concurrency), "--kv-cache-memory-bytes", str(size)]

    def _measure(
        self, name: str, prompts: Sequence[Sequence[int]], options: Sequence[str]
    ) -> tuple[Measurement, str]:
        """One server's measurement and the name of its backend."""
        backend, toptheta = (None, None) if name == "platform" else ("TOPTHETA", self.toptheta)
        if backend is not None and self.speculative is not None:
            options = [*options, "--speculative-config", json.dumps(self.speculative)]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "server.log"
            with serve(self.model, backend, toptheta, options, log) as url:
                # The first request of a server compiles and warms up; it is not measured.
                short = [prompts[0][:64], prompts[0][-64:]][: self.concurrency]
                request_all(url, self.model, short, min(8, self.max_tokens))
                result = summarise(request_all(url, self.model, prompts, self.max_tokens))
                return result, backend or picked_backend(log.read_text())


def _median(results: Sequence[Measurement]) -> dict[str, Any]:
    keys = ("decode_tokens_per_second", "itl_ms_median", "ttft_ms_median")
    medians: dict[str, Any] = {
        key: statistics.median(getattr(result, key) for result in results) for key in keys
    }
    return medians | {"rounds": [asdict(result) for result in results]}
