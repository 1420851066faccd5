"""The interfaces that the adapter relies on, in every vLLM that it supports, read off the sources."""

import ast
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path

import pytest
from vllm_interfaces import NAMES, SIGNATURES

from topt_vllm import envs

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from fetch_vllm_sources import VERSIONS as FETCHED

VERSIONS = ["installed", *FETCHED]

pytest.importorskip("vllm")


def sources(version: str) -> Path:
    """vLLM's package folder; the test is skipped where scripts/fetch_vllm_sources.py has not put one."""
    if version == "installed":
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        return Path(str(spec.origin)).parent
    folder = envs.cache_dir() / "wheels" / f"vllm-{version}" / "vllm"
    if not folder.exists():
        pytest.skip(f"{folder} is missing; run: .venv/bin/python scripts/fetch_vllm_sources.py")
    return folder


@cache
def body(path: Path, owner: str) -> list[ast.stmt]:
    """Statements of a module, or of a class in it."""
    module = ast.parse(path.read_text(encoding="utf-8")).body
    if not owner:
        return module
    found = [node for node in module if isinstance(node, ast.ClassDef) and node.name == owner]
    assert found, f"{path} has no class {owner}"
    return found[0].body


def parameters(statements: list[ast.stmt], name: str) -> str | None:
    """Names of a function's parameters, in order; None without such a function."""
    functions = [node for node in statements if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions:
        return None
    args = functions[-1].args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return " ".join([*names, *([f"**{args.kwarg.arg}"] if args.kwarg else [])])


def names(statements: list[ast.stmt]) -> set[str]:
    """What a module or class defines: functions, classes, variables, and attributes set on ``self``."""
    found: set[str] = set()
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for inner in ast.walk(node):
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                    found.add(target.attr)
                elif isinstance(target, ast.Name) and inner is node:
                    found.add(target.id)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("file", "owner"), SIGNATURES, ids="-".join)
def test_signatures(version: str, file: str, owner: str):
    statements = body(sources(version) / file, owner)
    found = {name: parameters(statements, name) for name in SIGNATURES[file, owner]}
    assert found == SIGNATURES[file, owner]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("file", "owner"), NAMES, ids="-".join)
def test_attributes(version: str, file: str, owner: str):
    missing = set(NAMES[file, owner].split()) - names(body(sources(version) / file, owner))
    assert not missing


def test_overrides_take_what_vllm_gives():
    """Every method of ours that has a recorded namesake has its parameters, or takes any."""
    from topt_vllm.backend.backend import TopThetaBackend
    from topt_vllm.backend.builder import TopThetaBuilder
    from topt_vllm.backend.hosts.cpu import (
        CpuTopThetaBackend,
        CpuTopThetaBuilder,
        CpuTopThetaImpl,
        _VectorBuilder,
    )
    from topt_vllm.backend.hosts.cpu_platform import TopThetaCpuPlatform
    from topt_vllm.backend.hosts.gpu import GpuBackend, GpuImpl
    from topt_vllm.backend.hosts.stock import StockBackend, StockBuilder
    from topt_vllm.backend.impl import TopThetaImpl
    from topt_vllm.backend.states import PackedStatesBackend, StatesBackend, StatesLayer, _StatesBuilder
    from topt_vllm.backend.worker import NamesRequests

    triton, flash = "v1/attention/backends/triton_attn.py", "v1/attention/backends/flash_attn.py"
    cpu, backend = "v1/attention/backends/cpu_attn.py", "v1/attention/backend.py"
    pairs = [
        (TopThetaBackend, backend, "AttentionBackend"),
        (CpuTopThetaBackend, backend, "AttentionBackend"),
        (CpuTopThetaBackend, cpu, "CPUAttentionBackend"),
        (GpuBackend, backend, "AttentionBackend"),
        (StockBackend, backend, "AttentionBackend"),
        (StatesBackend, backend, "AttentionBackend"),
        (PackedStatesBackend, backend, "AttentionBackend"),
        (StatesLayer, "model_executor/layers/attention_layer_base.py", "AttentionLayerBase"),
        (_StatesBuilder, backend, "AttentionMetadataBuilder"),
        (TopThetaBuilder, backend, "AttentionMetadataBuilder"),
        (TopThetaBuilder, triton, "TritonAttentionMetadataBuilder"),
        (TopThetaBuilder, flash, "FlashAttentionMetadataBuilder"),
        (TopThetaBuilder, cpu, "CPUAttentionMetadataBuilder"),
        (CpuTopThetaImpl, cpu, "CPUAttentionBackendImpl"),
        (CpuTopThetaBuilder, cpu, "CPUAttentionMetadataBuilder"),
        (_VectorBuilder, cpu, "CPUAttentionMetadataBuilder"),
        (StockBuilder, backend, "AttentionMetadataBuilder"),
        (TopThetaImpl, triton, "TritonAttentionImpl"),
        (TopThetaImpl, flash, "FlashAttentionImpl"),
        (TopThetaImpl, cpu, "CPUAttentionBackendImpl"),
        (TopThetaImpl, backend, "AttentionImpl"),
        (TopThetaImpl, backend, "AttentionImplBase"),
        (GpuImpl, backend, "AttentionImpl"),
        (TopThetaCpuPlatform, "platforms/cpu.py", "CpuPlatform"),
        (NamesRequests, "v1/worker/worker_base.py", "WorkerBase"),
    ]
    compared = 0
    for ours, file, owner in pairs:
        for name, recorded in SIGNATURES[file, owner].items():
            if name not in vars(ours):
                continue
            method = inspect.unwrap(getattr(vars(ours)[name], "__func__", vars(ours)[name]))
            signature = inspect.signature(method).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
                assert " ".join(signature) == recorded, f"{ours.__name__}.{name}"
            compared += 1
    assert compared > 30
