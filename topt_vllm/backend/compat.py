"""Everything that depends on vLLM's version, with the versions it was read in and, where known, when it can go."""

import copy
import copyreg
import logging
import os
from collections.abc import Mapping
from functools import wraps
from typing import Any

import psutil
import torch

BACKEND_NAME = "TOPTHETA"
BACKEND_PATH = "topt_vllm.backend.choice.TopThetaBackend"
GPU_WORKER = "topt_vllm.backend.hosts.gpu_worker.TopThetaWorker"
DRAFTER = "topt_vllm.backend.drafting.SparseDrafter"

logger = logging.getLogger("vllm.topt_vllm")


def register_backend() -> None:
    """Registers TOPTHETA with vLLM, once per process.

    With ``VLLM_TARGET_DEVICE=cpu`` vLLM (0.32) loads no platform plugin, and its own CPU platform runs CPU_ATTN
    whatever backend is named. Then TOPTHETA stays unregistered, so that naming it fails instead of running dense.
    """
    from vllm import envs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.backends.registry import register_backend as vllm_register_backend

    if envs.VLLM_TARGET_DEVICE == "cpu":
        logger.warning(
            "TOPTHETA is not available: VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins. Unset it; "
            "vLLM's CPU build needs no such variable at run time."
        )
        return
    # register_backend raises on a name that exists (0.32).
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        takes_names = hasattr(AttentionBackendEnum, "register")
        backend = (
            BACKEND_NAME if takes_names else _add_member(AttentionBackendEnum, BACKEND_NAME, BACKEND_PATH)
        )
        vllm_register_backend(backend, BACKEND_PATH)
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)  # type: ignore[arg-type]


def _add_member(enumeration: Any, name: str, value: str) -> Any:
    """Gives an Enum another member.

    vLLM 0.31 registers classes for its own names only, among them CUSTOM, which would not say whose backend it is.
    Goes with 0.31.
    """
    member = object.__new__(enumeration)
    member._name_, member._value_ = name, value
    # As an attribute first: Enum refuses to replace a member that it knows.
    setattr(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    return member


def _reduce_backend(member: Any) -> tuple[Any, ...]:
    """Pickles TOPTHETA by name.

    An Enum pickles by value, and a spawned engine unpickles its configuration before it loads plugins: "is not a
    valid AttentionBackendEnum" (0.32). Goes when vLLM loads general plugins before unpickling.
    """
    if member.name == BACKEND_NAME:
        return _restore_backend, ()
    return type(member), (member.value,)


def _restore_backend() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register_backend()
    return AttentionBackendEnum[BACKEND_NAME]


def cpu_platform_in_force() -> str | None:
    """Qualified name of the CPU platform that vLLM would use (plain or Zen), None for none (0.31 to 0.33)."""
    from vllm.platforms import cpu_platform_plugin

    return cpu_platform_plugin()


def cpu_platform_class() -> Any:
    """The class named by :func:`cpu_platform_in_force`."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    name = cpu_platform_in_force()
    if name is None:
        raise RuntimeError("vLLM runs on no CPU platform here")
    return resolve_obj_by_qualname(name)


def is_chosen(vllm_config: Any) -> bool:
    """Whether some layers of this engine are to run on TOPTHETA (options as in 0.31 to 0.33)."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return any(getattr(backend, "name", backend) == BACKEND_NAME for backend in chosen)


def uses_v2_runner(arguments: Mapping[str, Any]) -> bool:
    """Whether an engine with these arguments of ``vllm.LLM`` gets vLLM's V2 model runner.

    vLLM (0.31 to 0.33) decides by the configuration, VLLM_USE_V2_MODEL_RUNNER and whether Triton has a backend for
    the device, so the configuration is made for the question. GPUs get V2, save for some models on ROCm (0.31);
    CPUs get V1 where Triton can't compile for them. Goes with V1.
    """
    from vllm.engine.arg_utils import EngineArgs

    return bool(EngineArgs(**arguments).create_engine_config().use_v2_model_runner)


def drafts_sparsely(vllm_config: Any) -> bool:
    """Whether the model is to draft for itself with sparse attention (options as in 0.31 to 0.33)."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method == "custom_class" and speculative.model == DRAFTER


def drafting_metadata(group: Any, common: Any, index: int) -> Any:
    """Metadata of an attention group of the runner for a step that drafts.

    0.32 and 0.33 also map block tables to the blocks of kernels with smaller ones; 0.31 has those in its tables.
    """
    if hasattr(group, "build_metadata_for_drafting"):
        return group.build_metadata_for_drafting(common, index)
    return group.get_metadata_builder().build_for_drafting(common, index)


def cores_left_idle(vllm_config: Any) -> tuple[int, int] | None:
    """Cores that vLLM's CPU workers leave to its other processes, and of how many; None where none is set aside.

    Unless told otherwise, each worker has threads for one logical CPU of each core of its memory node, and of those
    not for the last; with a KV connector not for the last two (0.32).
    """
    told = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") != "auto"
    if told or "VLLM_CPU_NUM_OF_RESERVED_CPU" in os.environ:
        return None
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend != "mp":
        return None
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    idle = parallel.world_size * (1 if vllm_config.kv_transfer_config is None else 2)
    return (idle, cores) if idle < cores else None


def name_requests(vllm_config: Any) -> None:
    """Has the engine run by the worker that knows requests by name, unless the user named another one.

    Goes when a metadata builder is given the names of a batch's requests, and a custom drafter its batch (0.32
    gives neither).
    """
    parallel = vllm_config.parallel_config
    if parallel.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
        parallel.worker_cls = "topt_vllm.backend.hosts.cpu_worker.TopThetaWorker"


def unasked_backend(vllm_config: Any) -> Any:
    """The class that vLLM picks for the decoder layers of a model when no backend is named (0.31 to 0.33).

    Raises:
        ValueError: vLLM has none for this model here.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    unasked = copy.copy(vllm_config)
    unasked.attention_config = copy.copy(vllm_config.attention_config)
    unasked.attention_config.backend, unasked.attention_config.backend_per_kind = None, {}
    model_config = vllm_config.model_config
    with set_current_vllm_config(unasked):
        return get_attn_backend(
            model_config.get_head_size(),
            model_config.dtype,
            vllm_config.cache_config.cache_dtype,
            use_mm_prefix=model_config.is_mm_prefix_lm,
        )


def unasked_backend_of_layer(options: dict[str, Any]) -> Any:
    """The same for one layer.

    Args:
        options: What a platform asks a backend about the layer (``AttentionBackend.validate_configuration``).

    Raises:
        ValueError: vLLM has none for such a layer here.
    """
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import AttentionSelectorConfig

    asked = {name: options[name] for name in AttentionSelectorConfig._fields if name in options}
    return resolve_obj_by_qualname(
        current_platform.get_attn_backend_cls(None, attn_selector_config=AttentionSelectorConfig(**asked))
    )


def as_configured(hf_config: Any) -> Any:
    """A model's configuration without what vLLM's model has written into it, for a fingerprint goes by all of it.

    FalconH1's layers set how much of a head is rotated, which is all of it and stands in no configuration (0.32).
    """
    rope = getattr(hf_config, "rope_parameters", None)
    if getattr(hf_config, "model_type", None) != "falcon_h1" or "partial_rotary_factor" not in (rope or {}):
        return hf_config
    found = copy.deepcopy(hf_config)
    del found.rope_parameters["partial_rotary_factor"]
    return found


def let_caches_be_shared_beside_states() -> None:
    """Has vLLM know the specs of layers that share a cache, also in groups whose pages are of several sizes.

    vLLM (0.32, 0.33) adds such a layer to the group of the layer whose cache it shares, and then looks for its
    spec among the group's: KeyError. No hook lies between. Goes when vLLM adds the spec too.

    Which layers those are isn't known before: Gemma 4's drafter is told whose cache to share once it is made.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs
    from vllm.v1.worker import gpu_model_runner, utils
    from vllm.v1.worker.gpu import attn_utils

    add = utils.add_kv_sharing_layers_to_kv_cache_groups

    @wraps(add)
    def add_with_specs(shared: dict[str, str], groups: list[Any], *others: Any) -> None:
        add(shared, groups, *others)
        for group in groups:
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                specs = group.kv_cache_spec.kv_cache_specs
                specs |= {layer: specs[owner] for layer, owner in shared.items() if owner in specs}

    # Each runner has imported it by name. Whoever calls this twice replaces what the first call put there.
    for module in (gpu_model_runner, attn_utils):
        module.add_kv_sharing_layers_to_kv_cache_groups = add_with_specs


def start_state_space_layers(vllm_config: Any) -> None:
    """Chooses the kernels of Mamba layers, as vLLM does where it plans the cache, but whatever its groups are.

    Where pages of a group are of several sizes, vLLM (0.31 to 0.33) overlooks them, and the first decoded row ends
    with "Mamba SSU backend has not been initialized". It only asks for their kind. Goes when it looks inside those
    groups, as it does elsewhere.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec

    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, MambaBase)
    groups = [
        KVCacheGroupSpec([name], MambaSpec(block_size=1, shapes=(), dtypes=(), mamba_type=layer.mamba_type))
        for name, layer in layers.items()
    ]
    initialize_mamba_ssu_backend(
        vllm_config.mamba_config,
        KVCacheConfig(num_blocks=0, kv_cache_tensors=[], kv_cache_groups=groups),
        use_replayssm=vllm_config.cache_config.use_replayssm,
    )


def of_served_model(vllm_config: Any) -> Any:
    """The configuration of the served model, where this is the one that a separate draft model is made with.

    vLLM's second model runner (0.31 to 0.33) puts the draft model into the model's place and leaves the attention
    backend as it is; the first one picks a backend for the draft model anew.
    """
    speculative = vllm_config.speculative_config
    served = getattr(speculative, "target_model_config", None)
    model_config = vllm_config.model_config
    if served is None or model_config is served or model_config is not speculative.draft_model_config:
        return vllm_config
    found = copy.copy(vllm_config)
    found.model_config, found.parallel_config = served, speculative.target_parallel_config
    return found


def loads_drafter() -> bool:
    """Whether the layers that are being made draft for the served model: those of another model, or of a head.

    Names don't tell: heads of EAGLE number their layers on behind the model's, those of MTP in part from 0, as the
    model's. vLLM tags what it loads beside the model, for its compiler (0.31 to 0.33).
    """
    from vllm.compilation import backends

    return backends.model_tag == "draft_model" or backends.model_tag.endswith("_head")


# What vLLM stores in CPU caches under the names of --kv-cache-dtype: the bytes of torch's formats, K [D, P] and
# V [P, D] as at 16 bits. Its writer cuts digits off instead of rounding, and saturates (0.32).
CPU_FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
