"""What is decided once, before anything is loaded: configuration, threshold table, kernel."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from topt_vllm.attention.api import Implementation, load_implementation, screening
from topt_vllm.attention.common import Thetas
from topt_vllm.config import ConfigError, TopThetaConfig
from topt_vllm.model_identity import ModelIdentity, identify
from topt_vllm.table_search import chooses_no_table, find_table

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Resolved:
    """The outcome of start-up.

    Attributes:
        config: The plugin's settings.
        identity: The served model.
        implementation_name: Chosen kernel.
        implementation: Its module.
        thetas: Thresholds of each sparse layer over all query heads; empty for θ = −inf everywhere.
        description: One line for the log.
    """

    config: TopThetaConfig
    identity: ModelIdentity
    implementation_name: str
    implementation: Implementation
    thetas: dict[int, Thetas]
    description: str

    @property
    def dense_up_to(self) -> int:
        """Longest context that is attended densely for being short (tokens)."""
        shortest = [int(thetas.lengths[0]) - 1 for thetas in self.thetas.values()]
        return max([self.config.min_seq_len, *shortest])


def resolve(vllm_config: "VllmConfig") -> Resolved:
    """Checks everything that can be known before the model is loaded, and compiles the kernel.

    Raises:
        ConfigError: A setting of ``toptheta``, or a vLLM option that TOPTHETA refuses.
        ThresholdTableError: No usable table.
        RuntimeError: The kernel can't be built.
    """
    config = TopThetaConfig.from_additional_config(vllm_config.additional_config)
    _refuse(vllm_config)
    model_config = vllm_config.model_config
    identity = identify(model_config.hf_config, Path(model_config.model).name, model_config.revision)
    found = find_table(config, identity, model_config.model, model_config.revision)
    name, implementation = load_implementation(config.implementation, vllm_config.device_config.device_type)
    if config.k_screen != "off":
        screening(implementation)
    thetas: dict[int, Thetas] = {}
    if found is None:
        rows = "every V row is read (θ = −inf" + (")" if chooses_no_table(config) else ": no table found)")
    else:
        table, path = found
        budget = table.budget(config.k)
        thetas = table.thetas(budget)
        rows = f"table {path}, budget k = {budget.key}, dense layers {budget.dense_layers or 'none'}"
        rows += f"; {budget.quality.sentence()}" if budget.quality is not None else ""
        if (longest := model_config.max_model_len) > table.lengths[-1]:
            rows += f"; contexts of {table.lengths[-1]} to {longest} tokens use extrapolated thresholds"
    return Resolved(config, identity, name, implementation, thetas, f"TOPTHETA: {name} kernel, {rows}")


def _refuse(vllm_config: "VllmConfig") -> None:
    if vllm_config.kv_transfer_config is not None and vllm_config.kv_transfer_config.is_kv_transfer_instance:
        raise ConfigError(
            "TOPTHETA doesn't work with a KV connector (--kv-transfer-config): blocks that arrive from elsewhere "
            "carry no V sums, which the compensation needs. Remove the connector or choose another backend."
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ConfigError(
            "TOPTHETA doesn't work with --kv-sharing-fast-prefill: layers would skip rows whose V sums are needed. "
            "Remove the option or choose another backend."
        )
