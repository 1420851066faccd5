"""The serving benchmark: its client, its arithmetic, and what vLLM's servers are asked for; none runs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from table_factory import make_table
from tiny_models import SMALL, save_model
from transformers import LlamaConfig

from topt_vllm.benchmarks import client, serve
from topt_vllm.benchmarks.cache_size import cache_bytes
from topt_vllm.benchmarks.client import Measurement, Stream, summarise
from topt_vllm.benchmarks.model_shapes import SHAPES
from topt_vllm.benchmarks.server import picked_backend
from topt_vllm.cli.main import main
from topt_vllm.engines.process import EngineError
from topt_vllm.table.file import dump
from topt_vllm.table.identity import identify


def test_only_the_time_in_which_all_requests_decode_counts():
    early = Stream(0.0, [1.0, 2.0, 3.0, 3.5, 4.0], [1, 2, 3, 4, 5])
    late = Stream(0.0, [3.0, 3.5, 4.0, 9.0], [1, 2, 4, 5])
    result = summarise([early, late])
    # From 3.0 to 4.0: two tokens of the first, three of the second (two of them in one chunk).
    assert (result.tokens, result.seconds, result.decode_tokens_per_second) == (5, 1.0, 5.0)
    assert result.itl_ms_median == 500.0
    assert result.ttft_ms_median == 2000.0


def test_answers_that_never_overlap_are_an_error():
    with pytest.raises(ValueError, match="--max-tokens"):
        summarise([Stream(0.0, [1.0, 2.0], [1, 2]), Stream(0.0, [3.0, 4.0], [1, 2])])


@contextmanager
def answering(status: int, *events: bytes) -> Iterator[str]:
    """A server that answers every request with these events; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert request["stream_options"]["continuous_usage_stats"]
            assert (request["ignore_eos"], request["temperature"]) == (True, 0.0)
            self.send_response(status)
            self.end_headers()
            for event in events:
                self.wfile.write(event + b"\n\n")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def chunk(tokens: int, text: str = "a") -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [{"text": text}], "usage": usage}).encode()


def test_the_client_counts_tokens_by_chunk():
    # A ping, two tokens in a chunk, one without a token, and the summary at the end.
    events = chunk(1), b": ping", chunk(3, "é"), chunk(3, ""), chunk(4), chunk(4), b"data: [DONE]"
    with answering(200, *events) as url:
        [stream] = client.request_all(url, "model", [[1, 2, 3]], 4)
    assert stream.tokens == [1, 3, 4]
    assert stream.times == sorted(stream.times)
    assert len(stream.times) == 3
    assert stream.start < stream.times[0]


def test_what_a_server_says_in_place_of_an_answer_is_the_error():
    with answering(400, b'{"error": "too long"}') as url, pytest.raises(EngineError, match=r"400.*too long"):
        client.request_all(url, "model", [[1, 2, 3]], 4)
    broken = chunk(1), b'data: {"error": {"message": "the engine died"}}'
    with answering(200, *broken) as url, pytest.raises(EngineError, match=r"broke off.*the engine died"):
        client.request_all(url, "model", [[1, 2, 3]], 4)
    with pytest.raises(EngineError, match="connection to the server broke"):
        client.request_all(url, "model", [[1, 2, 3]], 4)


@pytest.mark.parametrize(
    ("log", "name"),
    [
        (
            "INFO [cuda.py:506] Using FLASH_ATTN attention backend out of potential backends: ['A', 'B'].",
            "FLASH_ATTN",
        ),
        ("INFO [rocm.py:849] Using ROCM_ATTN backend out of potential backends: ['ROCM_ATTN'].", "ROCM_ATTN"),
        ("INFO Using backend TORCH_SDPA for vit attention", "CPU_ATTN"),
    ],
)
def test_the_backend_that_vllm_picked_is_read_off_its_log(log: str, name: str):
    pytest.importorskip("vllm")
    assert picked_backend(log) == name


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, list[str]]]:
    """Backend and options of each server that is started; none runs, and all measure the same."""
    pytest.importorskip("vllm")
    found: list[tuple[str | None, list[str]]] = []

    @contextmanager
    def server(
        model: str, backend: str | None, toptheta: Any, options: list[str], log: Path
    ) -> Iterator[str]:
        found.append((backend, list(options)))
        log.write_text("")
        yield "http://here"

    monkeypatch.setattr(serve, "serve", server)
    monkeypatch.setattr(serve, "request_all", lambda *_: [])
    monkeypatch.setattr(serve, "summarise", lambda _: Measurement(2.0, 1.0, 1.0, 4, 2.0))
    return found


def test_stock_is_asked_for_no_backend_and_both_get_the_same_cache(
    tmp_path: Path, asked: list[tuple[str | None, list[str]]]
):
    model = save_model(tmp_path, LlamaConfig(**SMALL))
    benchmark = serve.ServeBenchmark(str(model), "ab " * 400, 2, 500, 8, 1, {"budget": 64}, dtype="float32")
    outcome = benchmark.run(lambda _: None)
    (first, options), (second, others) = asked
    assert (first, second) == (None, "TOPTHETA")
    assert options == others
    assert options[:2] == ["--dtype", "float32"]
    size = int(options[options.index("--kv-cache-memory-bytes") + 1])
    assert size == cache_bytes(identify(LlamaConfig(**SMALL), ""), 2 * 508, "float32")
    assert outcome["settings"]["platform_backend"] == "CPU_ATTN"
    assert outcome["ratio_decode"] == 1


def test_drafts_are_those_of_topthetas_server_alone(
    tmp_path: Path, asked: list[tuple[str | None, list[str]]]
):
    (tmp_path / "text.txt").write_text("ab " * 400)
    model = save_model(tmp_path / "model", LlamaConfig(**SMALL))
    dump(make_table(identify(LlamaConfig(**SMALL), "model")), model / "toptheta.yaml")
    drafts = {"model": "topt_vllm.backend.drafting.SparseDrafter", "num_speculative_tokens": 4}
    command = ["bench", "serve", "--model", str(model), "--dataset", str(tmp_path / "text.txt")]
    command += ["--concurrency", "2", "--prompt-tokens", "100", "--toptheta", '{"budget": 64}']
    assert main([*command, "--speculative-config", json.dumps(drafts)]) == 0
    options = dict(asked)
    assert options["TOPTHETA"] == [*options[None], "--speculative-config", json.dumps(drafts)]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("concurrency", "prompt_tokens", "max_tokens"), [(1, 500, 8), (2, 64, 4), (8, 16, 128)]
)
def test_a_server_warms_up_within_what_it_was_started_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrency: int, prompt_tokens: int, max_tokens: int
):
    """A server of one sequence answers two requests in turns, and there is no time in which both decode."""
    sent: list[tuple[list[list[int]], int]] = []
    monkeypatch.setattr(serve, "request_all", lambda _, __, *given: sent.append(given))
    model = str(save_model(tmp_path, LlamaConfig(**SMALL)))
    serve.ServeBenchmark(model, "ab " * 400, concurrency, prompt_tokens, max_tokens, 1, {}).run(
        lambda _: None
    )
    assert len(sent) == 4
    for prompts, tokens in sent:
        assert 1 <= len(prompts) <= concurrency
        assert all(1 <= len(prompt) <= prompt_tokens for prompt in prompts)
        assert 1 <= tokens <= max_tokens


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--toptheta", '{"budgt": 64}'], "toptheta.budgt (value 64) is not a setting"),
        (["--toptheta", '{"budget": "64"}'], "toptheta.budget is '64'"),
        (["--toptheta", '{"budget": 100}'], "budget is 100, but the table has budgets 64, 128"),
        (["--toptheta", '{"k_screen": "int4"}'], "has no K screen 'int4'; it has: int4+4"),
        (["--toptheta", '{"k_screen": "int4+4"}'], "has no key_statistics"),
        (["--toptheta", '{"implementation": "triton"}'], "the triton kernel runs on GPUs"),
        (["--toptheta", '{"thresholds": "absent.yaml"}'], "absent.yaml: can't be read"),
        (["--prompt-tokens", "2040"], "are more than the model's context of 2048 tokens"),
        (["--concurrency", "9"], "900 are needed for different prompts. Add text, or lower --concurrency"),
    ],
)
def test_what_toptheta_would_refuse_is_refused_before_the_platform_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
):
    pytest.importorskip("vllm")
    monkeypatch.setattr(serve, "serve", pytest.fail)
    monkeypatch.setattr("topt_vllm.attention.triton.launcher.interpreted", lambda: False)
    model = save_model(tmp_path / "model", LlamaConfig(**SMALL))
    dump(make_table(identify(LlamaConfig(**SMALL), "model")), model / "toptheta.yaml")
    (tmp_path / "text.txt").write_text("ab " * 200)
    sizes = ["--concurrency", "2", "--prompt-tokens", "100", "--max-tokens", "9"]
    command = ["bench", "serve", "--model", str(model), "--dataset", str(tmp_path / "text.txt")]
    assert main([*command, *sizes, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_cache_has_room_for_every_token_and_for_what_lies_beside_it():
    shape = identify(LlamaConfig(**SHAPES["llama-8b"]), "llama-8b")
    tokens = 8 * 32768
    assert 1.25 < cache_bytes(shape, tokens, "auto") / (tokens * 131072) < 2
    assert cache_bytes(shape, tokens, "float32") == 2 * cache_bytes(shape, tokens, "bfloat16")
    assert cache_bytes(shape, 1, "auto") == 256 << 20
