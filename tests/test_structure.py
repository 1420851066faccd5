"""Arrows between the parts point one way (docs/design.md); read off the import statements."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "topt_vllm"


def imports(folder: str) -> dict[Path, set[str]]:
    """Every module imported anywhere in a file, also inside functions, by file."""
    found = {}
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[path] = names
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (
            "attention",
            ("vllm", "transformers", "topt_vllm.backend", "topt_vllm.table", "topt_vllm.config"),
        ),
        (
            "attention/cpu",
            ("topt_vllm.attention.reference", "topt_vllm.attention.api", "topt_vllm.attention.triton"),
        ),
        (
            "attention/triton",
            ("topt_vllm.attention.reference", "topt_vllm.attention.api", "topt_vllm.attention.cpu"),
        ),
        # The server reads it, so what only makes or measures tables stays out.
        (
            "table",
            (
                "vllm",
                "transformers",
                "topt_vllm.attention.api",
                "topt_vllm.attention.cpu",
                "topt_vllm.attention.reference",
                "topt_vllm.attention.triton",
                "topt_vllm.adaptation",
                "topt_vllm.backend",
                "topt_vllm.benchmarks",
                "topt_vllm.calibration",
                "topt_vllm.cli",
                "topt_vllm.engines",
                "topt_vllm.evaluation",
                "topt_vllm.replay",
                "topt_vllm.report",
                "topt_vllm.verify",
            ),
        ),
        (
            "replay",
            ("vllm", *(f"topt_vllm.{part}" for part in ("backend", "calibration", "cli", "evaluation"))),
        ),
        ("calibration", ("vllm", *(f"topt_vllm.{part}" for part in ("backend", "cli", "evaluation")))),
        (
            "evaluation",
            ("vllm", *(f"topt_vllm.{part}" for part in ("backend", "benchmarks", "calibration", "cli"))),
        ),
        (
            "backend",
            (
                "topt_vllm.calibration",
                "topt_vllm.cli",
                "topt_vllm.attention.cpu",
                "topt_vllm.attention.triton",
                "topt_vllm.attention.reference",
            ),
        ),
        ("benchmarks", ("topt_vllm.cli", "topt_vllm.backend", "topt_vllm.verify")),
        (
            "verify",
            ("topt_vllm.cli", "topt_vllm.benchmarks", "topt_vllm.calibration", "topt_vllm.evaluation"),
        ),
        (
            "engines",
            ("vllm", *(f"topt_vllm.{part}" for part in ("backend", "benchmarks", "cli", "verify"))),
        ),
        # It reads files, and needs neither a model nor what has measured it.
        (
            "report",
            (
                "vllm",
                "torch",
                "transformers",
                "topt_vllm.attention",
                "topt_vllm.backend",
                "topt_vllm.benchmarks",
                "topt_vllm.calibration",
                "topt_vllm.cli",
                "topt_vllm.evaluation",
                "topt_vllm.verify",
            ),
        ),
    ],
)
def test_a_part_does_not_import_what_lies_above_or_beside_it(folder: str, forbidden: tuple[str, ...]):
    for path, names in imports(folder).items():
        wrong = [
            name for name in names if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)
        ]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_the_adapter_s_mixins_know_no_host_and_hosts_not_each_other():
    """vLLM's builds have one of them; which, is chosen in one place when vLLM looks the name up."""
    hosts = "topt_vllm.backend.hosts"
    apart = {"cpu": ("gpu", "flash", "triton", "stock"), "cpu_platform": ("gpu", "flash", "triton", "stock")}
    apart |= dict.fromkeys(("gpu", "flash", "triton", "stock"), ("cpu", "cpu_platform"))
    for path, names in imports("backend").items():
        if path.parent.name == "hosts":
            wrong = [f"{hosts}.{other}" for other in apart.get(path.stem, ())]
        else:
            wrong = [] if path.stem == "choice" else [hosts]
        found = [name for name in names if any(name == bad or name.startswith(f"{bad}.") for bad in wrong)]
        assert not found, f"{path.relative_to(PACKAGE)} imports {found}"


def test_only_the_adapter_what_starts_engines_and_one_module_know_vllm():
    known = ("backend", "benchmarks", "verify", "vllm_cpu_attention.py")
    for path, names in imports("").items():
        part = path.relative_to(PACKAGE).parts[0]
        if part not in known:
            assert not [name for name in names if name == "vllm" or name.startswith("vllm.")], path
