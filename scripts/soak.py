#!/usr/bin/env python3
"""Mixed traffic against a real `vllm serve`: no crash, no wrong answer, flat memory, counters that add up.

Answers are compared with golden ones: with thresholds "none" those of vLLM's own backend, with a table those of
the same server to one request at a time. With --kill-worker, a process of it is killed under load instead, with
vLLM's own backend and with TOPTHETA. Exit status 1 on any wrong answer, fault or crash.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from soak_checks import Memory, counters, inconsistencies, judge, tree
from soak_traffic import LENGTHS, Answer, Clients, Prompt, Tally, make_prompts

from topt_vllm import envs
from topt_vllm.benchmarks.server import is_healthy, serve
from topt_vllm.cli.options import check_least, json_object
from topt_vllm.errors import UserError
from topt_vllm.output import not_writable
from topt_vllm.verify.plan import no_table

PLATFORM_BACKEND = "CPU_ATTN"
SAMPLE_SECONDS = 2.0
STOP_SECONDS = 60
HEALTH_SECONDS = 30
KILL_AFTER_SECONDS = 20


class Soak:
    """One run with the given options."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self._args, self._folder = args, folder
        self._prompts: list[Prompt] = make_prompts(args.model, args.texts, args.prompts, args.max_tokens)
        self._max_model_len = max(LENGTHS) + args.max_tokens + 8
        self._toptheta: dict[str, Any] = args.toptheta
        self._dense = self._toptheta.get("thresholds") == "none"

    def run(self) -> dict[str, Any]:
        """Traffic for the given time; what came of it."""
        stock = self._dense and self._args.backend == "TOPTHETA"
        golden = self._stock_golden() if stock else None
        with self._server(self._args.backend) as url:
            root = server_process()
            if golden is None:
                golden = self._golden(url)
            before = counters(url)
            memory = Memory(root)
            with sampled(memory):
                started = time.monotonic()
                tally = self._traffic(url, started + 60 * self._args.minutes)
                seconds = time.monotonic() - started
            alive = root.is_running() and is_healthy(url, HEALTH_SECONDS)
            after = settled_counters(url) if alive else {}
            stopped = stop(root)
        verdicts = judge(tally.answers, golden, self._prompts, self._args.noise)
        new = {name: value - before.get(name, 0.0) for name, value in after.items()}
        faults = [f"{times} times: {fault}" for fault, times in tally.faults.most_common()] + stopped
        if not alive:
            faults.append("the server is gone or doesn't answer")
        elif self._args.backend == "TOPTHETA":
            layers = json.loads((Path(self._args.model) / "config.json").read_text())["num_hidden_layers"]
            faults += inconsistencies(new, tally.tokens, len(tally.answers), layers, not self._dense)
        slope = memory.slope()
        if slope > self._args.max_slope:
            faults.append(f"memory grows by {slope:.1f} MiB/min; allowed: {self._args.max_slope}")
        return {
            "seconds": round(seconds, 1),
            "requests": dict(tally.requests),
            "complete_answers": verdicts.compared,
            "equal_to_golden": verdicts.equal,
            "near_ties": verdicts.compared - verdicts.equal - len(verdicts.wrong),
            "largest_tie_gap": round(verdicts.largest_gap, 4),
            "largest_logprob_drift": round(verdicts.largest_drift, 4),
            "wrong": verdicts.wrong,
            "faults": faults,
            "rss_slope_mib_per_min": round(slope, 2),
            "rss": memory.by_process(),
            "rss_mib_by_minute": memory.curve(),
            "tokens_per_second": round(tally.tokens / seconds, 1),
            "slowest_seconds": {kind: round(took, 1) for kind, took in tally.seconds.items()},
            "counters": {name: new[name] for name in sorted(new) if name.startswith("toptheta:")},
        }

    def kill_worker(self) -> dict[str, Any]:
        """Kills the engine's process under load, with vLLM's own backend and with ours; what clients saw."""
        outcomes = {}
        golden: list[Answer] | None = None
        for backend in (PLATFORM_BACKEND, "TOPTHETA"):
            with self._server(backend) as url:
                alone = self._golden(url)  # of each server, so that both have the same prefixes cached
                golden = alone if golden is None or not self._dense else golden
                outcomes[backend] = self._kill(url, golden)
        wrong = [f"{name}: {line}" for name, outcome in outcomes.items() for line in outcome["wrong"]]
        faults = [
            f"{name}: clients hang" for name, outcome in outcomes.items() if outcome["hanging_requests"]
        ]
        faults += [
            f"{name}: no answer was complete, so none was compared"
            for name, outcome in outcomes.items()
            if not outcome["complete_answers"]
        ]
        if len({outcome["server_ended"] for outcome in outcomes.values()}) > 1:
            faults.append("one server ended and the other did not")
        return outcomes | {"wrong": wrong, "faults": faults}

    def _kill(self, url: str, golden: list[Answer]) -> dict[str, Any]:
        root = server_process()
        title = {"engine": "VLLM::EngineCore", "worker": "VLLM::Worker"}[self._args.kill_worker]
        victim = next(process for process in tree(root) if title in " ".join(process.cmdline()))
        killed = time.monotonic() + KILL_AFTER_SECONDS
        timer = threading.Timer(KILL_AFTER_SECONDS, victim.kill)
        timer.start()
        # Clients go on for a while, as real ones would.
        tally = self._traffic(url, killed + KILL_AFTER_SECONDS)
        seconds = time.monotonic() - killed
        gone, _ = psutil.wait_procs([root], timeout=STOP_SECONDS)
        verdicts = judge(tally.answers, golden, self._prompts, self._args.noise)
        return {
            "server_ended": bool(gone),
            "exit_status": gone[0].returncode if gone else None,
            "healthy_afterwards": is_healthy(url, HEALTH_SECONDS),
            "seconds_from_kill_to_last_client": round(seconds, 1),
            "requests": dict(tally.requests),
            "complete_answers": verdicts.compared,
            "failed_requests": tally.faults.total(),
            "hanging_requests": sum(
                times for fault, times in tally.faults.items() if "no end within" in fault
            ),
            "errors": sorted({fault.partition(": ")[2] for fault in tally.faults}),
            "wrong": verdicts.wrong,
        }

    def _stock_golden(self) -> list[Answer]:
        with self._server(PLATFORM_BACKEND) as url:
            return self._golden(url)

    def _golden(self, url: str) -> list[Answer]:
        return asyncio.run(self._clients(url).alone())

    def _traffic(self, url: str, until: float) -> Tally:
        return asyncio.run(self._clients(url).run(self._args.clients, until, self._args.seed))

    def _clients(self, url: str) -> Clients:
        return Clients(url, self._args.model, self._prompts, self._max_model_len, self._args.timeout)

    @contextmanager
    def _server(self, backend: str) -> Iterator[str]:
        options = ["--enforce-eager", "--max-model-len", str(self._max_model_len)]
        options += ["--max-num-seqs", str(self._args.clients)]
        options += ["--kv-cache-memory-bytes", self._args.kv_cache, "--dtype", self._args.dtype]
        if self._args.step_tokens:
            options += ["--max-num-batched-tokens", str(self._args.step_tokens)]
        toptheta = self._toptheta if backend == "TOPTHETA" else None
        counter_files = Path(tempfile.mkdtemp(dir=self._folder))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counter_files)
        print(f"{backend}: starting", file=sys.stderr, flush=True)
        log = self._args.log_folder / f"soak-{backend}.log"
        with serve(self._args.model, backend, toptheta, options, log) as url:
            print(f"{backend}: {url}, log {log}", file=sys.stderr, flush=True)
            yield url


def server_process() -> psutil.Process:
    """The server that this process started."""
    for child in psutil.Process().children():
        if "serve" in child.cmdline():
            return child
    raise RuntimeError("the server's process is gone")


@contextmanager
def sampled(memory: Memory) -> Iterator[None]:
    """Samples memory until the block ends."""
    done = threading.Event()

    def sample() -> None:
        memory.sample(time.monotonic())
        while not done.wait(SAMPLE_SECONDS):
            memory.sample(time.monotonic())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def settled_counters(url: str) -> dict[str, float]:
    """Counters once nothing runs any more and the last second is exported."""
    last = counters(url)
    for _ in range(30):
        time.sleep(2.5)
        now = counters(url)
        if now == last and not now.get("vllm:num_requests_running"):
            return now
        last = now
    raise RuntimeError("the server's counters don't come to rest without traffic")


def stop(root: psutil.Process) -> list[str]:
    """Ends the server as an operator would; what was not clean about it."""
    processes = tree(root)
    if not processes:
        return []
    root.send_signal(signal.SIGINT)
    gone, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    faults = [f"{process.pid} still runs {STOP_SECONDS} s after SIGINT" for process in alive]
    status = next((process.returncode for process in gone if process.pid == root.pid), None)
    return faults + ([f"the server's exit status is {status}"] if status not in (0, None) else [])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    cache = envs.cache_dir()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(cache / "models/SmolLM2-135M-Instruct"), help="folder; default: %(default)s")
    add("--texts", type=Path, default=cache / "texts", help="folder of *.txt; default: %(default)s")
    add(
        "--toptheta",
        type=json_object('{"budget": 128}'),
        default=no_table(),
        help=f"the plugin's settings; default: {json.dumps(no_table())}",
    )
    add(
        "--backend",
        default="TOPTHETA",
        help=f"{PLATFORM_BACKEND} shows what is vLLM's own; default: %(default)s",
    )
    add("--minutes", type=float, default=30.0, help="of traffic; default: %(default)s")
    add("--clients", type=int, default=16, help="at once; default: %(default)s")
    add("--prompts", type=int, default=24, help="different ones; default: %(default)s")
    add("--max-tokens", type=int, default=32, help="of an answer; default: %(default)s")
    add("--kv-cache", default="1G", help="bytes of KV cache; default: %(default)s")
    add("--dtype", default="auto", help="of the model; default: %(default)s, which is the checkpoint's")
    add("--step-tokens", type=int, help="most tokens of a step; default: vLLM's own")
    add("--noise", type=float, default=0.25, help="gap of a near tie, in logits; default: %(default)s")
    add(
        "--max-slope",
        type=float,
        default=2.0,
        help="MiB/min that memory may grow; oneDNN alone grows by more until a server has seen steps of all "
        "numbers of tokens (docs/operations.md), so compare with --backend CPU_ATTN; default: %(default)s",
    )
    add("--timeout", type=float, default=300.0, help="seconds that a request may take; default: %(default)s")
    add("--seed", type=int, default=0, help="of the traffic; default: %(default)s")
    add(
        "--kill-worker",
        nargs="?",
        const="worker",
        choices=("worker", "engine"),
        help="kill this process of the server under load instead; default of the two: worker",
    )
    add("--log-folder", type=Path, default=Path(), help="for the servers' logs; default: here")
    add("--json", type=Path, help="write the outcome there too")
    args = parser.parse_args(argv)
    try:
        check_least(args, {"minutes": 0, "clients": 1, "prompts": 1, "max_tokens": 1, "step_tokens": 1})
    except UserError as error:
        parser.error(str(error))
    if args.json and (problem := not_writable(args.json)):
        parser.error(f"--json {args.json}: {problem}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # As Ctrl-C does: servers are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(args, Path(folder))
        outcome = soak.kill_worker() if args.kill_worker else soak.run()
    text = json.dumps(outcome, indent=1, ensure_ascii=False)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    failed = bool(outcome["wrong"] or outcome["faults"])
    print("FAIL" if failed else "PASS")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
