"""KV connectors: which are refused, and that those which move blocks move the states in them.

Offloading and NIXL copy on GPUs only. What runs here is vLLM's own registration of caches; what it means to copy
of a block is then copied on the CPU. Those that move layers: test_adapter_states.py, test_engine_connectors.py.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from adapter_cases import EVERY_HOST, FLASH, Host, vllm_config
from adapter_engine import make_rig
from adapter_rig import Rig, layer_name
from connector_copies import Copied, by_nixl, by_offloading, by_simple_offloading, caches_of, transfer
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_cache_interface import KVCacheLayout

from topt_vllm.backend.connectors import CARRYING, refuse_connector
from topt_vllm.backend.states import PackedStatesBackend
from topt_vllm.config import ConfigError

__all__ = ["make_rig", "vllm_config"]

FROM, TO = 3, 5
BLOCK_COMPACT = [layout for layout in KVCacheLayout if layout.is_block_compact]
PLAIN: tuple[int | None, ...] = (None, None, None)
# Where windows are more than other layers, or fewer, pages of a group lie where states lie in another.
WINDOWS = [(64, None, 64), (None, None, 64), (*(64,) * 5, *(None,) * 4), (*(None,) * 4, *(64,) * 5)]


def multi(*connectors: dict[str, Any]) -> KVTransferConfig:
    return transfer("MultiConnector", {"connectors": list(connectors)})


@pytest.mark.parametrize("name", CARRYING)
def test_connectors_that_carry_every_layer_are_allowed(name: str):
    refuse_connector(transfer(name))


def test_allowed_names_are_vllm_s():
    """So that none of them is another's after a rename."""
    assert set(CARRYING) <= set(KVConnectorFactory._registry)


@pytest.mark.parametrize(
    "name", sorted({*KVConnectorFactory._registry, "Mine"} - {*CARRYING, "MultiConnector"})
)
def test_others_are_refused_by_name_with_what_is_allowed(name: str):
    with pytest.raises(
        ConfigError, match=f"KV connector {name} .*isn't known to carry.*Allowed: .*NixlConnector"
    ):
        refuse_connector(transfer(name))


def test_code_that_is_not_vllm_s_is_refused_whatever_its_name():
    with pytest.raises(ConfigError, match=r"KV connector NixlConnector .*its code is not vLLM's"):
        refuse_connector(transfer("NixlConnector", kv_connector_module_path="mine.connectors"))
    with pytest.raises(ConfigError, match="its code is not vLLM's"):
        refuse_connector(transfer("MultiConnector", kv_connector_module_path="mine.connectors"))


def test_several_connectors_are_as_good_as_each_of_them():
    allowed = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    tier = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_bytes_to_use": 1}}
    refuse_connector(multi(allowed, tier))
    refuse_connector(
        multi(
            allowed, {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [tier]}}
        )
    )
    for refused in (
        {"kv_connector": "LMCacheConnectorV1"},
        {"kv_connector": "NixlConnector", "kv_connector_module_path": "mine.connectors"},
        {
            "kv_connector": "OffloadingConnector",
            "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec"},
        },
        {
            "kv_connector": "MultiConnector",
            "kv_connector_extra_config": {"connectors": [{"kv_connector": "Mine"}]},
        },
        {"kv_role": "kv_both"},
    ):
        with pytest.raises(ConfigError, match="KV connector"):
            refuse_connector(multi(allowed, refused))


@pytest.mark.parametrize(
    "extra",
    [{"spec_name": "TieringOffloadingSpec"}, {"canonical_layout": True}],
)
def test_offloading_is_allowed_to_the_host_s_memory_only(extra: dict[str, Any]):
    """The keys of shared stores don't tell states apart."""
    refuse_connector(transfer("OffloadingConnector", {"spec_name": "CPUOffloadingSpec"}))
    with pytest.raises(ConfigError, match=r"spec_name CPUOffloadingSpec"):
        refuse_connector(transfer("OffloadingConnector", extra))


def everything_is_copied(rig: Rig, copied: Copied) -> bool:
    """Whether what vLLM caches of a block of each group comes back in another block, states as well."""
    caches = caches_of(rig)
    for number, group in enumerate(rig.plan.kv_cache_groups):
        for name in group.layer_names:
            caches[name][FROM] = torch.rand(caches[name][FROM].shape).to(caches[name])
        kept = {name: caches[name][FROM].clone() for name in group.layer_names}
        taken = [part.clone() for part in copied(number, FROM)]
        for cache in caches.values():
            cache.zero_()
        for part, copy in zip(copied(number, TO), taken, strict=True):
            part.copy_(copy)
        if not all(torch.equal(caches[name][TO], kept[name]) for name in group.layer_names):
            return False
    return True


@pytest.fixture
def rig_of(make_rig: Any, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a rig of layers with these windows."""

    def make(
        host: Host, layout: KVCacheLayout, windows: tuple[int | None, ...] = PLAIN, **options: Any
    ) -> Rig:
        offered = host.backend.supported_kv_cache_layouts()
        if offered is not None and layout not in offered:
            pytest.skip(f"{host} reads {', '.join(each.name for each in offered)}")
        monkeypatch.setattr(vllm_config.model_config.hf_config, "num_hidden_layers", len(windows))
        rig = make_rig(host, layers=len(windows), windows=windows, layout=layout, **options)
        assert any(name not in map(layer_name, range(len(windows))) for name in caches_of(rig))
        return rig

    return make


@pytest.mark.parametrize("by", [by_offloading, by_simple_offloading, by_nixl])
@pytest.mark.parametrize("layout", BLOCK_COMPACT, ids=lambda layout: layout.name)
@pytest.mark.parametrize("host", EVERY_HOST)
def test_all_of_a_block_is_copied(
    rig_of: Any, monkeypatch: pytest.MonkeyPatch, host: Host, layout: KVCacheLayout, by: Any
):
    rig = rig_of(host, layout)
    assert everything_is_copied(rig, by(rig, monkeypatch))


@pytest.mark.parametrize("by", [by_offloading, by_simple_offloading])
@pytest.mark.parametrize(
    "layout", PackedStatesBackend.supported_kv_cache_layouts(), ids=lambda layout: layout.name
)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("host", EVERY_HOST)
def test_all_of_a_block_is_copied_beside_windows(
    rig_of: Any, monkeypatch: pytest.MonkeyPatch, host: Host, windows: Any, layout: KVCacheLayout, by: Any
):
    rig = rig_of(host, layout, windows)
    assert len(rig.plan.kv_cache_groups) > 1
    assert everything_is_copied(rig, by(rig, monkeypatch))


def test_copies_of_k_are_copied_too(rig_of: Any, monkeypatch: pytest.MonkeyPatch):
    host = EVERY_HOST[0].values[0]
    if host.backend is None:
        pytest.skip("vLLM's build here has no CPU kernels")
    rig = rig_of(host, KVCacheLayout.LBHNC, settings={"k_screen": "int4+4"})
    assert sum(name.endswith("key_screen") for name in caches_of(rig)) == len(PLAIN)
    assert everything_is_copied(rig, by_nixl(rig, monkeypatch))


def test_nixl_is_refused_beside_windows_unless_all_layers_are_in_one_group(
    rig_of: Any, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
):
    """It takes one page from each address, the first that it meets, be it that of states or of a layer's."""
    rig = rig_of(FLASH, KVCacheLayout.BLHNC, WINDOWS[-1])
    states = rig.states().value_sums
    monkeypatch.setattr(vllm_config, "kv_transfer_config", transfer("NixlConnector"))
    with pytest.raises(ConfigError, match=r"NixlConnector .*beside sliding windows .*OffloadingConnector"):
        states.get_attn_backend()
    monkeypatch.setattr(vllm_config.scheduler_config, "disable_hybrid_kv_cache_manager", True)
    assert states.get_attn_backend() is PackedStatesBackend
    assert not everything_is_copied(rig, by_nixl(rig, monkeypatch)), "no reason to refuse it any more"
    rig = rig_of(FLASH, KVCacheLayout.BLHNC, WINDOWS[-1])
    assert len(rig.plan.kv_cache_groups) == 1
    assert everything_is_copied(rig, by_nixl(rig, monkeypatch))
