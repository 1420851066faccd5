"""The shell scripts: early refusals with a remedy, and a server that never outlives the quick start."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from topt_vllm.benchmarks.server import free_port
from topt_vllm.replay.texts import read_texts

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
BASH = shutil.which("bash") or "/bin/bash"
TOOLS = ("dirname", "sed", "cat", "cut", "sha256sum", "tail")

# Stands in for vLLM: a front end with one worker, which answers /health, or dies when told to. It says
# how it was called.
FAKE_VLLM = """#!{python}
import http.server, os, subprocess, sys, time
port = sys.argv[sys.argv.index("--port") + 1]
settings = {{name: value for name, value in sorted(os.environ.items()) if name.startswith("VLLM_CPU_")}}
print("CALL", sys.argv, settings, os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"]), flush=True)
if os.environ.get("FAKE_SAYS_NO_MORE"):
    sys.exit()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "fake-worker", port])
print("TOPTHETA: cpu kernel, table fake.yaml", flush=True)
if os.environ.get("FAKE_DIES"):
    sys.exit("the engine is on fire")
if os.environ.get("FAKE_HANGS"):
    time.sleep(60)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={key: value for key, value in (os.environ | environment).items() if value},
        timeout=60,
    )


def workers(port: int) -> list[int]:
    """Fake workers of the fake server on ``port`` that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if "fake-worker" in words and str(port) in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def bin_without(tmp_path: Path) -> Path:
    """A PATH with a few tools, but neither compiler nor Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which everything that takes long is a stand-in."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("lib.sh", "quickstart.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    (root / "configs").mkdir()
    (root / "configs" / "SmolLM2-135M-Instruct.yaml").touch()
    (root / "scripts" / "install.sh").write_text(f"#!{BASH}\n")
    (root / "scripts" / "install.sh").chmod(0o755)
    (root / "scripts" / "prepare_demo.py").write_text("")
    result = '{"v_rows_read": 0.1, "decode_tokens_per_second": 9.0, "answer": "Yes."}'
    (root / "scripts" / "ask.py").write_text(
        f"import sys\nopen(sys.argv[sys.argv.index('--result') + 1], 'w').write({result!r})\n"
    )
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (root / ".venv" / "bin" / "vllm").write_text(FAKE_VLLM.format(python=sys.executable))
    (root / ".venv" / "bin" / "vllm").chmod(0o755)
    return root


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(script: Path):
    assert run(BASH, "-n", script).returncode == 0


@pytest.mark.parametrize("name", ["install.sh", "make_table.sh", "quickstart.sh", "test.sh"])
def test_help_names_the_usage_and_an_unknown_option_is_refused(name: str):
    script = ROOT / "scripts" / name
    shown = run(script, "--help")
    assert shown.returncode == 0
    assert f"Usage: ./scripts/{name}" in shown.stdout
    if name != "test.sh":  # whose further options are pytest's
        refused = run(script, "--nonsense")
        assert refused.returncode == 1
        assert "unknown option --nonsense" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare_demo.py", "ask.py", "chat.py"])
def test_python_scripts_have_help(name: str):
    assert "usage:" in run(sys.executable, ROOT / "scripts" / name, "--help").stdout


def test_the_folder_of_texts_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What says from which packages it was made is none of its texts; older folders say it in plain sight."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import prepare_demo

    (tmp_path / "play.txt").write_text("To be")
    prepare_demo.mark(tmp_path, ("plays==1",))
    assert prepare_demo.is_prepared(tmp_path, ("plays==1",))
    assert not prepare_demo.is_prepared(tmp_path, ("plays==2",))
    assert read_texts((str(tmp_path),), 1)[0] == ["To be"]
    (tmp_path / prepare_demo.MARKER).rename(tmp_path / "prepared.json")
    assert prepare_demo.is_prepared(tmp_path, ("plays==1",))


FAKE_COMMAND = """#!{python}
import sys
wanted = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*wanted, sep="\\n", end="\\n\\n", file=log)
open(wanted[max(map(wanted.index, {{"--output", "--json", "-o"}} & set(wanted))) + 1], "x")
"""


def test_a_table_its_evaluation_and_its_report_are_made_once(checkout: Path, tmp_path: Path):
    log, command = tmp_path / "log", checkout / ".venv" / "bin" / "topt-vllm"
    shutil.copy(ROOT / "scripts" / "make_table.sh", checkout / "scripts")
    command.write_text(FAKE_COMMAND.format(python=sys.executable, log=str(log)))
    command.chmod(0o755)
    options = ["--length", "2048", "--calibrate", "a b.txt", "c.txt", "--evaluate", "d.txt"]
    made = run(checkout / "scripts" / "make_table.sh", "a model/M", tmp_path / "out", *options)
    assert made.returncode == 0, made.stderr
    calibrate, evaluate, report = (call.split("\n") for call in log.read_text().strip().split("\n\n"))
    assert calibrate[calibrate.index("--dataset") :][:3] == ["--dataset", "a b.txt", "c.txt"]
    assert evaluate[evaluate.index("--dataset") :][:2] == ["--dataset", "d.txt"]
    for words in (calibrate, evaluate):
        assert words[words.index("--model") + 1] == "a model/M"
        assert words[words.index("--max-seq-length") + 1] == "2048"
    assert evaluate[evaluate.index("--needles") :][:3] == ["--needles", "2048", "--json"]
    assert calibrate[calibrate.index("--target-rows") + 1] == "10%"
    assert evaluate[evaluate.index("--budget") :][:5] == [
        "--budget",
        "128",
        "loss-1%",
        "loss-0.2%",
        "rows-10%",
    ]
    files = {f"{tmp_path}/out/{name}" for name in ("M.yaml", "evaluation.json", "report.html")}
    assert {str(path) for path in (tmp_path / "out").iterdir()} == files
    assert files <= set(report)
    again = run(checkout / "scripts" / "make_table.sh", "a model/M", tmp_path / "out", *options)
    assert again.returncode == 0
    assert again.stdout.count("is there; remove it") == 3
    assert log.read_text().count("\n\n") == 3


@pytest.mark.parametrize(("asked", "name"), [("30", "rows-30%"), ("none", None)])
def test_a_table_s_target_of_rows_is_chosen_or_left_out(
    checkout: Path, tmp_path: Path, asked: str, name: str | None
):
    log, command = tmp_path / "log", checkout / ".venv" / "bin" / "topt-vllm"
    shutil.copy(ROOT / "scripts" / "make_table.sh", checkout / "scripts")
    command.write_text(FAKE_COMMAND.format(python=sys.executable, log=str(log)))
    command.chmod(0o755)
    given = ["M", tmp_path / "out", "--calibrate", "a.txt", "--evaluate", "b.txt", "--target-rows", asked]
    assert run(checkout / "scripts" / "make_table.sh", *given).returncode == 0
    calibrate, evaluate, _ = (call.split("\n") for call in log.read_text().strip().split("\n\n"))
    assert ("--target-rows" in calibrate) == (asked in calibrate) == (name is not None)
    assert [word for word in evaluate if word.startswith("rows-")] == [name][: name is not None]


def test_an_evaluation_that_was_killed_is_not_taken_for_a_whole_one(checkout: Path, tmp_path: Path):
    log, command = tmp_path / "log", checkout / ".venv" / "bin" / "topt-vllm"
    shutil.copy(ROOT / "scripts" / "make_table.sh", checkout / "scripts")
    fake = FAKE_COMMAND.format(python=sys.executable, log=str(log))
    command.write_text(fake + "sys.exit(wanted[0] == 'evaluate')\n")
    command.chmod(0o755)
    asked = ["M", tmp_path / "out", "--calibrate", "a.txt", "--evaluate", "b.txt"]
    killed = run(checkout / "scripts" / "make_table.sh", *asked)
    assert killed.returncode == 1
    assert "run the same command again" in killed.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()
    command.write_text(fake)
    assert run(checkout / "scripts" / "make_table.sh", *asked).returncode == 0
    assert [call.split("\n")[0] for call in log.read_text().strip().split("\n\n")] == [
        "calibrate",
        "evaluate",
        "evaluate",
        "report",
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "M.yaml",
        "evaluation.json",
        "report.html",
    }


def test_a_taken_port_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run(ROOT / "scripts" / "quickstart.sh", "--port", port, PYTHON=sys.executable)
    assert refused.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in refused.stderr
    assert "--port" in refused.stderr


def test_a_port_that_is_no_port_is_refused():
    refused = run(ROOT / "scripts" / "quickstart.sh", "--port", "70000")
    assert refused.returncode == 1
    assert "'70000'" in refused.stderr


def test_a_missing_compiler_is_named(bin_without: Path):
    script = ROOT / "scripts" / "quickstart.sh"
    refused = run(BASH, script, "--port", free_port(), PATH=str(bin_without), PYTHON=sys.executable, CXX="")
    assert refused.returncode == 1
    assert "no C++ compiler was found" in refused.stderr
    assert "apt-get install g++" in refused.stderr


def test_a_missing_browser_stops_nothing(bin_without: Path):
    command = f"set -euo pipefail; source {ROOT}/scripts/lib.sh; find_chromium"
    done = run(BASH, "-c", command, PATH=str(bin_without))
    assert done.returncode == 0
    assert "is skipped (Debian: apt-get install chromium)" in done.stdout


def test_a_python_that_was_named_is_taken_or_nothing():
    command = f"set -euo pipefail; source {ROOT}/scripts/lib.sh; find_python"
    refused = run(BASH, "-c", command, PYTHON="/nowhere/python")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "(looked for: /nowhere/python)" in refused.stderr


def test_no_home_is_needed():
    done = run(BASH, "-c", f"set -euo pipefail; source {ROOT}/scripts/lib.sh; echo $CACHE", HOME="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("topt_vllm")


def test_what_is_to_be_pasted_is_quoted():
    words = 'vllm serve "my model" "$(settings "it\'s.yaml" loss-1%)"'
    command = f"source {ROOT}/scripts/lib.sh; command_line {words}"
    done = run(BASH, "-c", command, TOPT_VENV=str(Path(sys.executable).parents[1]))
    *start, settings = shlex.split(done.stdout)
    assert start == ["vllm", "serve", "my model"]
    assert json.loads(settings) == {"toptheta": {"thresholds": "it's.yaml", "budget": "loss-1%"}}


def test_a_missing_python_is_named(bin_without: Path):
    refused = run(BASH, ROOT / "scripts" / "quickstart.sh", PATH=str(bin_without), PYTHON="")
    assert refused.returncode == 1
    assert "Python 3.11 to 3.14 was not found" in refused.stderr


@pytest.mark.slow
def test_quickstart_ends_with_its_result_and_leaves_nothing(checkout: Path, tmp_path: Path):
    port = free_port()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = run(
        checkout / "scripts" / "quickstart.sh",
        "--port",
        port,
        TOPT_CACHE_DIR=str(tmp_path / "cache"),
        TMPDIR=str(scratch),
    )
    assert done.returncode == 0, done.stderr
    assert "calibrate --model" in done.stdout
    name, _, result = done.stdout.splitlines()[-1].partition(" ")
    assert name == "QUICKSTART"
    assert json.loads(result)["v_rows_read"] == 0.1
    assert workers(port) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_the_command_that_is_shown_starts_the_same_server(checkout: Path, tmp_path: Path):
    port, cache = free_port(), tmp_path / "cache"
    script = checkout / "scripts" / "quickstart.sh"
    done = run(script, "--port", port, TOPT_CACHE_DIR=str(cache), VLLM_CPU_KVCACHE_SPACE="3")
    assert done.returncode == 0, done.stderr
    (shown,) = (line for line in done.stdout.splitlines() if " serve " in line)
    call = run(BASH, "-c", shown, FAKE_SAYS_NO_MORE="1", TMPDIR=str(tmp_path)).stdout
    assert "'VLLM_CPU_KVCACHE_SPACE': '3'" in call
    assert "'VLLM_CPU_NUM_OF_RESERVED_CPU': '0'" in call
    assert (cache / "logs" / f"quickstart-{port}.log").read_text().startswith(call)


@pytest.mark.slow
def test_a_server_that_dies_shows_its_log(checkout: Path, tmp_path: Path):
    port = free_port()
    done = run(
        checkout / "scripts" / "quickstart.sh",
        "--port",
        port,
        TOPT_CACHE_DIR=str(tmp_path / "cache"),
        FAKE_DIES="1",
    )
    assert done.returncode == 1
    assert "the engine is on fire" in done.stderr
    assert workers(port) == []


@pytest.mark.slow
def test_a_signal_stops_the_server(checkout: Path, tmp_path: Path):
    port = free_port()
    environment = os.environ | {"TOPT_CACHE_DIR": str(tmp_path / "cache"), "FAKE_HANGS": "1"}
    command = [str(checkout / "scripts" / "quickstart.sh"), "--port", str(port)]
    script = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not workers(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers(port)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=20) == 143
    assert workers(port) == []


@pytest.mark.slow
def test_keep_leaves_the_server_and_says_how_to_stop_it(checkout: Path, tmp_path: Path):
    port = free_port()
    script = checkout / "scripts" / "quickstart.sh"
    done = run(script, "--keep", "--port", port, TOPT_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert workers(port)
    stop = re.search(r"stop it: (.*)", done.stdout)
    assert stop
    assert run(BASH, "-c", stop[1]).returncode == 0
    deadline = time.monotonic() + 10
    while workers(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers(port) == []


# Stands in for Python: says how pytest is called, and sees the packages in a folder only.
FAKE_PYTHON = """#!{bash}
[[ $1 != -m ]] || {{ echo "{name}: $*"; exit; }}
PYTHONPATH={packages} exec {python} -S "$@"
"""


class GpuCheckout:
    """A checkout with a stand-in for .venv, and another for a Python with vLLM, torch and a GPU."""

    def __init__(self, root: Path) -> None:
        self.script = root / "scripts" / "test.sh"
        self.python = root / "gpu-python"
        self.packages = root / "packages"
        for name in ("lib.sh", "test.sh", "gpu_environment.py"):
            (root / "scripts").mkdir(exist_ok=True)
            shutil.copy(ROOT / "scripts" / name, root / "scripts")
        (root / "scripts" / "install.sh").write_text(f"#!{BASH}\n")
        (root / "scripts" / "install.sh").chmod(0o755)
        (root / ".venv" / "bin").mkdir(parents=True)
        self.packages.mkdir()
        for name, path in (("on the CPU", root / ".venv" / "bin" / "python"), ("on the GPU", self.python)):
            fake = FAKE_PYTHON.format(bash=BASH, name=name, packages=self.packages, python=sys.executable)
            path.write_text(fake)
            path.chmod(0o755)
        self.path = root / "bin"
        self.path.mkdir()
        for name in ("python3", "python"):
            (self.path / name).symlink_to(self.python)

    def install(self, *modules: str, gpu: bool = True) -> None:
        """Makes modules that only exist, vLLM and torch always."""
        for module in ("vllm", "torch", *modules):
            text = f"import types; cuda = types.SimpleNamespace(is_available=lambda: {gpu})"
            (self.packages / f"{module}.py").write_text(text)

    def install_plugin(self) -> None:
        """Makes this package's entry point."""
        info = self.packages / "topt_vllm-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: topt-vllm\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\ntoptheta = topt_vllm.plugin:register\n"
        )

    def test(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the script with the stand-in on PATH."""
        path = f"{self.path}:{os.environ['PATH']}"
        return run(self.script, *options, **{"PATH": path, "TRITON_INTERPRET": "", **environment})


@pytest.fixture
def gpu_checkout(tmp_path: Path) -> GpuCheckout:
    return GpuCheckout(tmp_path)


@pytest.mark.slow
def test_a_python_with_a_gpu_runs_its_tests(gpu_checkout: GpuCheckout):
    gpu_checkout.install("pytest", "xdist", "hypothesis")
    gpu_checkout.install_plugin()
    done = gpu_checkout.test("--gpu", "-k", "operator")
    assert done.returncode == 0, done.stderr
    assert "on the GPU: -m pytest" in done.stdout
    assert done.stdout.endswith("-n 4 -k operator -m gpu\n")
    assert "on the CPU" not in done.stdout
    named = gpu_checkout.test("--gpu", TOPT_TEST_PYTHON=str(gpu_checkout.python))
    assert f"Tests on the GPU, by {gpu_checkout.python}" in named.stdout


@pytest.mark.slow
def test_what_a_python_with_a_gpu_lacks_is_named(gpu_checkout: GpuCheckout):
    gpu_checkout.install("pytest", "hypothesis")
    refused = gpu_checkout.test("--gpu")
    assert refused.returncode == 1
    assert "lacks packages" in refused.stderr
    root = gpu_checkout.python.parent
    assert refused.stderr.rstrip().endswith(f"-m pip install pytest-xdist --editable {root}")


@pytest.mark.slow
def test_without_a_gpu_its_tests_run_in_the_interpreter_and_the_command_says_so(gpu_checkout: GpuCheckout):
    gpu_checkout.install(gpu=False)
    done = gpu_checkout.test("--gpu", "-x")
    assert done.returncode == 0, done.stderr
    assert "sees no GPU: its tests run in Triton's interpreter, on the CPU." in done.stdout
    assert "on the CPU: -m pytest" in done.stdout
    assert done.stdout.endswith("-x -m gpu\n")
    refused = gpu_checkout.test("--gpu", TOPT_TEST_PYTHON=str(gpu_checkout.python))
    assert refused.returncode == 1
    assert "TOPT_TEST_PYTHON can't run the tests on a GPU: torch of" in refused.stderr
    refused = gpu_checkout.test("--gpu", TOPT_TEST_PYTHON="no-such-python")
    assert "no-such-python does not run" in refused.stderr


def test_pins_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lint = project["optional-dependencies"]["lint"]
    ruff = next(pin for pin in lint if pin.startswith("ruff=="))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {ruff}
