"""KV connectors: which of them carry what TOPTHETA stores beside K and V, and moving it layer by layer.

A connector carries it if it takes every cache layer that vLLM has planned, whatever its name and size; most do, for
they move blocks. Read in vLLM 0.31 to 0.33; docs/operations.md says what was run.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.distributed.kv_transfer import (
    get_kv_transfer_group,
    has_kv_transfer_group,
    is_v1_kv_transfer_group,
)
from vllm.forward_context import get_forward_context

from topt_vllm.config import ConfigError

CARRYING = (
    "DecodeBenchConnector",
    "ExampleConnector",
    "MooncakeConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
# They copy one page from each address where some layer's begins. Where groups of layers lie over each other, beside
# windows and state-space layers, a layer's page may begin where the shorter one of states does (0.31 to 0.33).
_BY_ADDRESS = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
# Of OffloadingConnector: the tier in the host's memory. The keys of shared stores don't tell states apart.
_OFFLOADING_SPEC = "CPUOffloadingSpec"


def refuse_connector(transfer: Any) -> None:
    """Checks an engine's ``--kv-transfer-config``.

    Args:
        transfer: vLLM's ``KVTransferConfig``.

    Raises:
        ConfigError: A connector isn't known to carry what lies beside the cache; the message says which are.
    """
    for connector in _each(vars(transfer)):
        reason = _reason_against(connector)
        if reason is not None:
            raise _refusal(connector, f"{reason}, and V sums and copies of K lie beside the cache", CARRYING)


def refuse_beside_other_layers(vllm_config: Any) -> None:
    """Checks it once more for models that cache anything but full attention, which is known when they are loaded.

    Args:
        vllm_config: vLLM's ``VllmConfig``.

    Raises:
        ConfigError: A connector would lose a part of some layers.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or not transfer.is_kv_transfer_instance:
        return
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:  # all layers are in one group
        return
    for connector in _each(vars(transfer)):
        if connector["kv_connector"] in _BY_ADDRESS:
            raise _refusal(
                connector,
                "beside sliding windows or state-space layers it would copy some blocks in part, with windows "
                "unless --disable-hybrid-kv-cache-manager is given",
                [name for name in CARRYING if name not in _BY_ADDRESS],
            )


def _refusal(connector: Mapping[str, Any], reason: str, allowed: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"TOPTHETA doesn't work with the KV connector {connector.get('kv_connector')} (--kv-transfer-config): "
        f"{reason}. Allowed: {', '.join(allowed)}, and MultiConnector of these. Name one of them, set "
        "toptheta.compensation to none and toptheta.k_screen to off, or choose another backend."
    )


def _each(connector: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A connector, or those that it consists of."""
    if connector.get("kv_connector") != "MultiConnector" or connector.get("kv_connector_module_path"):
        return [connector]
    parts = connector.get("kv_connector_extra_config", {}).get("connectors", [])
    return [part for child in parts for part in _each(child)]


def _reason_against(connector: Mapping[str, Any]) -> str | None:
    if connector.get("kv_connector_module_path"):  # it wins over the name
        return "its code is not vLLM's, so it isn't known to carry every cache layer"
    if connector.get("kv_connector") not in CARRYING:
        return "it isn't known to carry every cache layer of a block"
    extra = connector.get("kv_connector_extra_config") or {}
    if connector["kv_connector"] == "OffloadingConnector" and (
        extra.get("spec_name", _OFFLOADING_SPEC) != _OFFLOADING_SPEC or extra.get("canonical_layout")
    ):
        return f"it carries every cache layer with spec_name {_OFFLOADING_SPEC} and without canonical_layout only"
    return None


def wait_for(names: Iterable[str]) -> None:
    """Waits for cache layers of a step that a connector loads one by one, as vLLM does for attention layers."""
    if (connector := _moving()) is not None:
        for name in names:
            connector.wait_for_layer_load(name)


def save(layers: Mapping[str, Any]) -> None:
    """Hands cache layers of a step to a connector that saves them one by one, as vLLM does attention layers.

    Args:
        layers: By name, as vLLM knows them.
    """
    if (connector := _moving()) is not None:
        metadata = get_forward_context().attn_metadata
        for name, layer in layers.items():
            connector.save_kv_layer(name, layer.kv_cache, metadata[name])


def _moving() -> Any | None:
    """The connector, where this step moves anything through one."""
    if not has_kv_transfer_group() or not is_v1_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector if connector.has_connector_metadata() else None
