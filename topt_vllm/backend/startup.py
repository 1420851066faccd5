"""What is decided once, before anything is loaded: configuration, threshold table, kernel."""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from topt_vllm.attention.api import load_implementation, require
from topt_vllm.attention.common import Thetas
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.backend import compat
from topt_vllm.backend.resolved import Resolved
from topt_vllm.backend.screens import choose_screens, describe_screens, unasked_format
from topt_vllm.config import ConfigError, TopThetaConfig
from topt_vllm.table.identity import ModelIdentity, identify
from topt_vllm.table.layers import FULL, layer_heads, layer_kinds
from topt_vllm.table.schema import Budget
from topt_vllm.table.search import chooses_no_table, find_table
from topt_vllm.table.words import as_text, name_of_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def resolve(vllm_config: "VllmConfig") -> Resolved:
    """Checks everything that can be known before the model is loaded, and compiles the kernel.

    A separate draft model has no table of its own: for its layers too it is the served model's outcome.

    Raises:
        ConfigError: A setting of ``toptheta``, or a vLLM option that TOPTHETA refuses.
        ThresholdTableError: No usable table.
        RuntimeError: The kernel can't be built.
    """
    vllm_config = compat.of_served_model(vllm_config)
    config = TopThetaConfig.from_additional_config(vllm_config.additional_config)
    device_type = vllm_config.device_config.device_type
    dense_on_platform = device_type != "cpu" and config.implementation == "auto"
    if config.sift is not None or not dense_on_platform:
        _refuse(vllm_config, config)
    model_config = vllm_config.model_config
    hf_config = compat.as_configured(model_config.hf_config)
    identity = identify(hf_config, as_text(name_of_model(model_config.model)), model_config.revision)
    name, implementation = load_implementation(config.implementation, device_type)
    if device_type != "cpu" and not implementation.capabilities.graphs:
        raise ConfigError(
            f"toptheta.implementation is {name!r}, which can't run inside vLLM's CUDA graphs; "
            "allowed on GPUs: auto | triton"
        )
    try:
        require(implementation, screen=config.screen)
    except ValueError as error:
        raise ConfigError(f"toptheta.k_screen on {device_type}: {error}") from error
    text = hf_config.get_text_config()
    kinds = enumerate(layer_kinds(text, model_config.max_model_len))
    see_all = [layer for layer, kind in kinds if kind in FULL]
    known = Resolved(config, identity, implementation, _kv_heads(text, identity), see_all, _labels(identity))
    if config.sift is not None:
        return _with_sift(known, vllm_config, name)
    return _with_table(known, vllm_config, name, dense_on_platform)


def _with_table(known: Resolved, vllm_config: "VllmConfig", name: str, dense_on_platform: bool) -> Resolved:
    """The outcome under ``policy: toptheta``, whether there is a table or not; errors as for :func:`resolve`."""
    config, identity, model_config = known.config, known.identity, vllm_config.model_config
    found = find_table(config, identity, model_config.model, model_config.revision)
    thetas: dict[int, Thetas] = {}
    budget = None
    labels = known.table_labels
    if found is None:
        rows = "every V row is read (θ = −inf" + (")" if chooses_no_table(config) else ": no table found)")
    else:
        table, path = found
        budget = table.budget(config.budget)
        thetas = budget.thetas(table.lengths)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        labels = _labels(identity, as_text(path.name), digest, str(budget.key))
        rows = f"table {path}, budget {budget.key}, dense layers {budget.dense_layers or 'none'}"
        rows += f"; {budget.quality.sentence()}" if budget.quality is not None else ""
        if (longest := model_config.max_model_len) > table.lengths[-1]:
            rows += f"; contexts of {table.lengths[-1]} to {longest} tokens use extrapolated thresholds"
    screens: dict[int, ScreenTransform] = {}
    format, about_screen = config.screen, ""
    if config.k_screen == "auto" and found is not None:
        format, about_screen = unasked_format(known, found[0], vllm_config)
    if format is not None:
        screens = choose_screens(format, found, budget, known.implementation, vllm_config)
        about_screen = describe_screens(format, config, screens, thetas)
    rows += f"; {about_screen}" if about_screen else ""
    drafts = compat.drafts_sparsely(vllm_config)
    if drafts:
        _check_drafting(vllm_config, config, identity, thetas)
        rows += "; sparse rows draft, dense rows verify"
    keys = _promised_keys(config, budget, vllm_config.parallel_config)
    rows += "; thresholds adapt to the traffic" if keys else ""
    if dense_on_platform and thetas:
        _refuse(vllm_config, config)
        served_by = f"{name} kernel, dense layers on vLLM's own"
    else:
        served_by = "vLLM's own kernels" if dense_on_platform else f"{name} kernel"
    return replace(
        known,
        table_labels=labels,
        description=f"TOPTHETA: {served_by}, {rows}",
        thetas=thetas,
        screen_format=format,
        screens=screens,
        promised_keys=keys,
        dense_on_platform=dense_on_platform,
        drafts=drafts,
    )


def _with_sift(known: Resolved, vllm_config: "VllmConfig", name: str) -> Resolved:
    """The outcome under ``policy: sift``, which has no table.

    Raises:
        ConfigError: The speculator, the worker, the model or microbatches don't go with it.
    """
    worker = vllm_config.parallel_config.worker_cls
    if vllm_config.device_config.device_type != "cpu" and worker != compat.GPU_WORKER:
        raise ConfigError(
            f"toptheta.policy is 'sift', whose thresholds belong to requests, and vLLM's worker on GPUs "
            f"({worker}) doesn't name them. Add --worker-cls {compat.GPU_WORKER}, or use policy toptheta."
        )
    if vllm_config.device_config.device_type != "cpu" and vllm_config.model_config.is_hybrid:
        raise ConfigError(
            "toptheta.policy is 'sift', whose thresholds belong to requests, and vLLM's model runner on GPUs (0.31 "
            "to 0.33) names none in batches of a model with state-space layers. Use policy toptheta."
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ConfigError(
            f"toptheta.policy is 'sift', but speculation is {speculative.method!r}: a draft model's steps would "
            "count as those of the requests. Use ngram, or policy toptheta."
        )
    if vllm_config.parallel_config.use_ubatching:
        # vLLM (0.32) names no requests of a part; TOPTHETA would take each part's for the step's first.
        raise ConfigError(
            "toptheta.policy is 'sift', but --enable-dbo cuts steps in two, whose rows can't be told by request. "
            "Leave one of them out."
        )
    config, sparse, layers = known.config, len(known.see_all), known.identity.num_layers
    rows = f"policy sift: {config.sift_warmup} dense rows of each request, then thresholds that skip "
    rows += f"{config.sift_tau:.1%} of the keys"
    rows += f" in {sparse} of {layers} layers" if sparse < layers else ""
    labels = _labels(known.identity, budget=f"sift {config.sift_tau}")
    return replace(known, table_labels=labels, description=f"TOPTHETA: {name} kernel, {rows}")


def _kv_heads(text_config: Any, identity: ModelIdentity) -> dict[int, int]:
    with_attention = set(range(identity.num_layers)) - set(identity.attention_free_layers)
    return {layer: layer_heads(text_config, layer).kv for layer in sorted(with_attention)}


def _labels(
    identity: ModelIdentity, name: str = "none", sha256: str = "", budget: str = ""
) -> dict[str, str]:
    return {
        "name": name,
        "sha256": sha256,
        "budget": budget,
        "model": identity.id,
        "fingerprint": identity.fingerprint,
    }


def _promised_keys(
    config: TopThetaConfig, budget: Budget | None, parallel_config: Any
) -> dict[int, list[int]]:
    """Keys that each query head of the sparse layers should keep, where thresholds adapt; else {}.

    Raises:
        ConfigError: They can't adapt.
    """
    if not config.adapt:
        return {}
    if parallel_config.use_ubatching:
        raise ConfigError(
            "toptheta.adapt is true, but --enable-dbo cuts steps in two, which share what heads have kept. Leave "
            "one of them out."
        )
    if budget is None:
        raise ConfigError(
            "toptheta.adapt is true, but there is no threshold table. Leave adapt out, or name one."
        )
    keys = budget.ks()
    silent = [entry.layer for entry in budget.layers if entry.layer not in {*keys, *budget.dense_layers}]
    if silent:
        raise ConfigError(
            f"toptheta.adapt is true, but budget {budget.key} doesn't say how many keys a query head of layer "
            f"{silent[0]} should keep. Choose a budget with a k, or leave adapt out."
        )
    return keys


def _check_drafting(
    vllm_config: "VllmConfig", config: TopThetaConfig, identity: ModelIdentity, thetas: dict[int, Thetas]
) -> None:
    """Raises ConfigError where the model can't draft for itself (:mod:`topt_vllm.backend.drafting`)."""
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    reasons = {
        "on GPUs": vllm_config.device_config.device_type != "cpu",
        "without a threshold table, for drafts would be dense": not thetas,
        "with toptheta.adapt, for drafts are not the traffic": config.adapt,
        "for models with state-space or linear-attention layers": identity.attention_free_layers,
        "for multimodal models": model_config.is_multimodal_model or model_config.uses_mrope,
        "with LoRA adapters": vllm_config.lora_config is not None,
        "with KV connectors": vllm_config.kv_transfer_config is not None,
        "with pipeline or data parallelism": max(
            parallel_config.pipeline_parallel_size, parallel_config.data_parallel_size
        )
        > 1,
    }
    if refused := [reason for reason, applies in reasons.items() if applies]:
        raise ConfigError(
            f"--speculative-config names {compat.DRAFTER}, which doesn't work {'; nor '.join(refused)}. Leave "
            "--speculative-config out."
        )


def _refuse(vllm_config: "VllmConfig", config: TopThetaConfig) -> None:
    transfer = vllm_config.kv_transfer_config
    states = config.compensation == "vmean" or config.screen is not None
    if transfer is not None and transfer.is_kv_transfer_instance and states:
        from topt_vllm.backend.connectors import refuse_connector

        refuse_connector(transfer)
    if vllm_config.load_config.load_format == "tensorizer":
        # vLLM 0.31 to 0.33; then nothing is registered in time for the cache to have room for it.
        raise ConfigError(
            "TOPTHETA doesn't work with --load-format tensorizer, which doesn't tell layers that their weights are "
            "there. Load the model another way, or choose another backend."
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ConfigError(
            "TOPTHETA doesn't work with --kv-sharing-fast-prefill: layers would skip rows whose V sums are needed. "
            "Remove the option or choose another backend."
        )
