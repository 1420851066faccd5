"""The plugin seen from vLLM, each case in a process of its own: registration, pickling, and its absence."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SELECT = """
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
import torch
def select(name, **options):
    config = AttentionSelectorConfig(64, torch.bfloat16, "auto", None, **options)
    backend = AttentionBackendEnum[name] if name else None
    return current_platform.get_attn_backend_cls(backend, attn_selector_config=config)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )


def test_import_is_free():
    code = "import sys, topt_vllm, topt_vllm.plugin; print({'vllm', 'torch', 'triton'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


def test_selection_through_the_entry_points():
    """Chosen: our class. Not chosen: what the stock platform answers. Unsupported: refused with the reason."""
    run = run_python(
        SELECT
        + """
from vllm.platforms.cpu import CpuPlatform
from topt_vllm.plugin import register
register()  # a second call must not raise
config = AttentionSelectorConfig(64, torch.bfloat16, "auto", None)
stock = CpuPlatform.get_attn_backend_cls(None, attn_selector_config=config)
assert select(None) == select("CPU_ATTN") == stock, select(None)
assert select("TOPTHETA").endswith("TopThetaBackend")
assert select("TOPTHETA", has_sink=True) == select("TOPTHETA")
assert select("TOPTHETA", attn_type="encoder_only") == stock
refusals = ({"use_mla": True}, {"use_per_head_quant_scales": True}, {"attn_type": "encoder_decoder"})
for options in refusals:
    try:
        select("TOPTHETA", **options)
    except ValueError as error:
        assert "TOPTHETA can't serve" in str(error)
        print("refused", list(options), error)
"""
    )
    assert run.returncode == 0, run.stderr[-2000:]
    refusals = [line for line in run.stdout.splitlines() if line.startswith("refused")]
    assert len(refusals) == 3
    for line, reason in zip(refusals, ("MLA", "per-head", "encoder_decoder"), strict=True):
        assert reason in line


def test_backend_survives_a_spawned_process():
    """vLLM's engine process unpickles its configuration before it loads plugins."""
    code = """
import pickle, subprocess, sys
from topt_vllm.plugin import register
register()
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Enum
data = pickle.dumps([Enum["TOPTHETA"], Enum["CPU_ATTN"]])
child = "import pickle, sys; a, b = pickle.load(sys.stdin.buffer); print(a.name, b.name)"
print(subprocess.run([sys.executable, "-c", child], input=data, stdout=subprocess.PIPE).stdout.decode())
"""
    assert "TOPTHETA CPU_ATTN" in run_python(code).stdout


@pytest.mark.parametrize(
    "environment",
    [{"VLLM_PLUGINS": "another"}, {"VLLM_TARGET_DEVICE": "cpu"}],
    ids=["plugin not allowed", "platform plugins bypassed"],
)
def test_where_the_plugin_cannot_act_its_name_is_unknown(environment: dict[str, str]):
    """Otherwise vLLM's CPU platform would run CPU_ATTN under our name."""
    run = run_python(SELECT + "print(select(None)); select('TOPTHETA')", **environment)
    assert "CPUAttentionBackend" in run.stdout
    assert "Unknown attention backend: 'TOPTHETA'" in run.stderr
