"""The soak test's own judgement: what it must find, and what it must let pass."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from soak import parse
from soak_checks import Memory, inconsistencies, judge
from soak_traffic import Answer, Clients, Prompt, Tally

PROMPTS = [Prompt((1, 2, 3), 3)]
GOLDEN = [
    Answer(
        ["token_id:5", "token_id:6", "token_id:7"],
        [-0.5, -0.1, -0.2],
        [
            {"token_id:5": -0.5, "token_id:4": -0.6, "token_id:3": -2.0},
            {"token_id:6": -0.1},
            {"token_id:7": -0.2},
        ],
        "length",
    )
]


def verdicts(tokens: list[int], logprobs: list[float], finish: str | None = "length"):
    answer = Answer([f"token_id:{token}" for token in tokens], logprobs, [{}] * len(tokens), finish)
    return judge([(0, answer)], GOLDEN, PROMPTS, noise=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--toptheta", "none"], "'none': a JSON object is expected"),
        (["--clients", "0"], "--clients 0: at least 1 is needed"),
        (["--minutes", "-1"], "--minutes -1.0: at least 0"),
        (["--json", "/nowhere/s.json"], "the folder /nowhere does not exist"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_server_starts(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        parse(options)
    assert message in capsys.readouterr().err


def test_equal_answer_passes_with_its_drift():
    outcome = verdicts([5, 6, 7], [-0.5, -0.1, -0.25])
    assert (outcome.wrong, outcome.equal) == ([], 1)
    assert outcome.largest_drift == pytest.approx(0.05)


def test_near_tie_passes_and_the_rest_is_not_compared():
    outcome = verdicts([4, 9, 9], [-0.55, -0.1, -0.1])
    assert (outcome.wrong, outcome.equal) == ([], 0)
    assert outcome.largest_gap == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "finish", "problem"),
    [
        ([3, 6, 7], [-0.5, -0.1, -0.2], "length", "token 0 is token_id:3, 1.500 below the golden one"),
        ([8, 6, 7], [-0.5, -0.1, -0.2], "length", "token 0 is token_id:8, not among the golden run's 3 best"),
        ([5, 6], [-0.5, -0.1], "length", "2 tokens instead of 3"),
        ([5, 6], [-0.5, -0.1], "stop", "ends after 2 of 3 tokens"),
        ([5, 6], [-0.5, -0.1], None, "finish_reason None"),
        ([5, 6, 7], [-0.5, float("nan"), -0.2], "length", "log-probabilities"),
        ([5, 6, 7], [-0.5, -9999.0, -0.2], "length", "log-probabilities"),
    ],
)
def test_wrong_answers_are_found(tokens, logprobs, finish, problem):
    (line,) = verdicts(tokens, logprobs, finish).wrong
    assert line.startswith("prompt 0 of 3 tokens: ")
    assert problem in line


SPARSE = {
    "toptheta:decode_rows_total": 200.0,
    "toptheta:decode_rows_total{sparse}": 100.0,
    "toptheta:v_rows_total": 5000.0,
    "toptheta:v_rows_read_total": 1000.0,
    "toptheta:attention_elements_total": 9000.0,
    "toptheta:attention_elements_kept_total": 900.0,
    "toptheta:dropped_mass_sum": 5.0,
    "toptheta:dropped_mass_count": 400.0,
    "vllm:generation_tokens_total": 110.0,
    "vllm:request_success_total": 6.0,
}


def problems(sparse: bool = True, **changes: float) -> list[str]:
    new = SPARSE | {name.replace("__", ":"): value for name, value in changes.items()}
    return inconsistencies(new, tokens=108, complete=5, layers=2, sparse=sparse)


def test_counters_that_fit_the_traffic_pass():
    assert problems() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"toptheta__v_rows_read_total": 5001.0},
        {"toptheta__v_rows_read_total": 0.0},
        {"toptheta__v_rows_read_total": 5000.0},
        {"toptheta__attention_elements_kept_total": 9001.0},
        {"toptheta__decode_rows_total": 160.0},
        {"toptheta__decode_rows_total": 260.0},
        {"toptheta__dropped_mass_sum": 500.0},
        {"vllm__generation_tokens_total": 100.0},
        {"vllm__request_success_total": 4.0},
        {"toptheta__v_rows_total": float("nan")},
    ],
)
def test_counters_that_contradict_the_traffic_are_found(changes):
    assert problems(**changes) != []


def test_sparse_rows_without_a_table_are_found():
    assert len(problems(sparse=False)) == 2


def test_memory_that_grows_after_the_warm_up_has_a_slope():
    memory = Memory(psutil.Process())
    for second in range(0, 600, 10):
        memory.samples.append((float(second), {1: 500.0, 2: 500.0 + max(0, 200 - second) * 5}))
    assert memory.slope() == pytest.approx(0.0, abs=1e-6)
    memory.samples = [(second, sizes | {1: 500 + 3 * second / 60}) for second, sizes in memory.samples]
    memory.titles = {1: "server", 2: "engine"}
    assert memory.slope() == pytest.approx(3.0, abs=1e-6)
    assert memory.curve() == [1752, 1456, 1158, 1012, 1014, 1018, 1020, 1024, 1026, 1030]
    server, engine = memory.by_process()
    assert server == "server: 530 MiB, +3.00 MiB/min"
    assert engine.startswith("engine: 500 MiB")


def traffic(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], timeout: float = 20) -> Tally:
    """Half a second of four clients against a server that answers everything with ``handler``; longer where the
    machine is so busy that none of them gets to ask.
    """

    async def run(seconds: float) -> Tally:
        application = web.Application()
        application.router.add_route("*", "/{tail:.*}", handler)
        async with TestServer(application) as server:
            clients = Clients(str(server.make_url("")).rstrip("/"), "m", PROMPTS, 100, timeout)
            return await clients.run(4, time.monotonic() + seconds, seed=0)

    tally = asyncio.run(run(0.5))
    return tally if tally.requests else asyncio.run(run(20))


def test_server_that_refuses_everything_has_faults_but_for_bad_requests():
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "no"}, status=400)

    tally = traffic(refuse)
    assert tally.faults
    assert tally.answers == []
    assert not [fault for fault in tally.faults if fault.startswith("bad")]


def test_server_that_accepts_bad_requests_is_found():
    async def accept(_: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": []}
        )

    faults = traffic(accept).faults
    assert any(fault.startswith("bad (") and "status 200" in fault for fault in faults)
    assert any(fault == "answer: cut off after 0 tokens" for fault in faults)


def test_server_that_hangs_is_found():
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    tally = traffic(hang, timeout=0.2)
    assert tally.faults
    assert all("no end within" in fault for fault in tally.faults)
