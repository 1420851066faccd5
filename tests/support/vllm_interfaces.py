"""What the adapter relies on in vLLM, as read in 0.32: a record that tests/test_vllm_interfaces.py compares with.

A key is a file of vLLM's package and a class in it, or an empty name for the module itself.
"""

_BUILD = "self common_prefix_len common_attn_metadata fast_build"
_BUILDER = "self kv_cache_spec layer_names vllm_config device"
_FORWARD = "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
_IMPL = (
    "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap "
    "attn_type kv_sharing_target_layer_name"
)
_SELECT = "cls selected_backend attn_selector_config num_heads"
_WRITE = "self layer key value kv_cache slot_mapping"

# Parameters, in order, of what we override or call.
SIGNATURES: dict[tuple[str, str], dict[str, str]] = {
    ("v1/attention/backend.py", "AttentionBackend"): {
        "get_name": "",
        "get_impl_cls": "",
        "get_builder_cls": "",
        "get_supported_kernel_block_sizes": "kv_cache_spec",
        "get_supported_head_sizes": "cls",
        "get_preferred_block_size": "cls default_block_size",
        "supported_kv_cache_layouts": "cls",
        "supports_alibi_sqrt": "cls",
        "supports_attn_type": "cls attn_type",
        "supports_batch_invariance": "cls",
        "supports_compute_capability": "cls capability",
        "supports_dcp": "cls",
        "supports_head_size": "cls head_size",
        "supports_mm_prefix": "cls",
        "supports_non_causal": "cls",
        "supports_per_head_quant_scales": "cls",
        "supports_rswa": "cls",
        "supports_sink": "cls",
        "validate_configuration": "cls head_size dtype kv_cache_dtype block_size use_mla has_sink use_sparse "
        "use_mm_prefix use_per_head_quant_scales device_capability attn_type has_sliding_window use_non_causal "
        "use_batch_invariant use_kv_connector use_pcp use_adaptive_verification use_dcp use_rswa",
    },
    ("v1/attention/backend.py", "AttentionMetadataBuilder"): {
        "__init__": _BUILDER,
        "_init_reorder_batch_threshold": "self reorder_batch_threshold supports_spec_as_decode "
        "supports_dcp_with_varlen",
        "build": _BUILD,
        "build_for_cudagraph_capture": "self common_attn_metadata",
        "build_for_drafting": "self common_attn_metadata draft_index",
        "get_cudagraph_support": "cls vllm_config kv_cache_spec",
        "update_block_table": "self metadata blk_table slot_mapping",
        "update_draft_decode_metadata": "self metadata",
    },
    ("v1/attention/backend.py", ""): {"max_decode_query_len": "vllm_config"},
    ("v1/attention/backend.py", "AttentionImpl"): {
        "forward": _FORWARD,
        "fused_output_quant_supported": "self quant_key",
    },
    ("v1/attention/backend.py", "AttentionImplBase"): {
        "process_weights_after_loading": "self act_dtype",
    },
    ("model_executor/layers/attention_layer_base.py", "AttentionLayerBase"): {
        "bind_kv_cache": "self kv_cache",
        "get_attn_backend": "self",
        "get_kv_cache_spec": "self vllm_config",
    },
    ("model_executor/layers/attention/attention.py", "Attention"): {
        "process_weights_after_loading": "self act_dtype",
    },
    ("model_executor/layers/mamba/ops/ssu_dispatch.py", ""): {
        "initialize_mamba_ssu_backend": "mamba_config kv_cache_config use_replayssm",
    },
    ("v1/worker/utils.py", ""): {
        "add_kv_sharing_layers_to_kv_cache_groups": "shared_kv_cache_layers kv_cache_groups "
        "runner_only_attn_layers",
    },
    ("v1/attention/backend.py", "CommonAttentionMetadata"): {"replace": "self **kwargs"},
    ("v1/attention/backends/flash_attn.py", "FlashAttentionImpl"): {
        "__init__": f"{_IMPL} sinks",
        "forward": _FORWARD,
        "do_kv_cache_update": _WRITE,
    },
    ("v1/attention/backends/flash_attn.py", "FlashAttentionMetadataBuilder"): {
        "__init__": _BUILDER,
        "build": _BUILD,
        "get_cudagraph_support": "cls vllm_config kv_cache_spec",
        "update_block_table": "self metadata blk_table slot_mapping",
    },
    ("v1/attention/backends/triton_attn.py", "TritonAttentionImpl"): {
        "__init__": f"{_IMPL} sinks use_alibi_sqrt chunk_lookback",
        "forward": _FORWARD,
        "do_kv_cache_update": _WRITE,
    },
    ("v1/attention/backends/triton_attn.py", "TritonAttentionMetadataBuilder"): {
        "__init__": _BUILDER,
        "build": _BUILD,
        "build_for_cudagraph_capture": "self common_attn_metadata",
    },
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionBackend"): {
        "get_supported_head_sizes": "cls",
        "supported_kv_cache_layouts": "cls",
    },
    ("v1/attention/backends/cpu_attn.py", ""): {
        "_get_attn_isa": "dtype block_size head_size kv_cache_dtype",
    },
    ("_custom_ops.py", ""): {
        "cpu_attn_reshape_and_cache": "key value key_cache value_cache slot_mapping isa k_scale v_scale "
        "kv_cache_dtype",
        "cpu_attn_get_scheduler_metadata": "num_reqs num_heads num_kv_heads head_dim seq_lens dtype "
        "query_start_loc causal sliding_window_size isa enable_kv_split dynamic_causal kv_cache_dtype",
        "cpu_attention_with_kv_cache": "query key_cache value_cache output query_start_loc seq_lens scale causal "
        "alibi_slopes sliding_window block_table softcap scheduler_metadata s_aux dynamic_causal k_scale v_scale "
        "kv_cache_dtype",
    },
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionBackendImpl"): {
        "__init__": f"{_IMPL} sinks",
        "forward": _FORWARD,
        "do_kv_cache_update": _WRITE,
    },
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionMetadataBuilder"): {
        "__init__": _BUILDER,
        "build": _BUILD,
        "_set_isa_to_layers": "self layer_names",
    },
    ("v1/attention/backends/utils.py", ""): {
        "split_decodes_and_prefills": "common_attn_metadata decode_threshold require_uniform "
        "treat_short_extends_as_decodes",
    },
    ("v1/attention/selector.py", ""): {
        "get_attn_backend": "head_size dtype kv_cache_dtype use_mla has_sink use_sparse use_mm_prefix "
        "use_per_head_quant_scales attn_type num_heads has_sliding_window",
    },
    ("v1/attention/backends/registry.py", ""): {"register_backend": "backend class_path is_mamba"},
    ("v1/attention/backends/registry.py", "AttentionBackendEnum"): {
        "get_class": "self",
        "get_path": "self include_classname",
    },
    ("platforms/__init__.py", ""): {"cpu_platform_plugin": ""},
    ("platforms/cpu.py", "CpuPlatform"): {
        "get_attn_backend_cls": _SELECT,
        "check_and_update_config": "cls vllm_config",
    },
    ("platforms/cuda.py", "CudaPlatformBase"): {"get_attn_backend_cls": _SELECT},
    ("platforms/rocm.py", "RocmPlatform"): {"get_attn_backend_cls": _SELECT},
    ("platforms/interface.py", "Platform"): {
        "fp8_dtype": "cls",
        "is_cpu": "self",
        "is_cuda": "self",
        "is_cuda_alike": "self",
        "is_rocm": "self",
    },
    ("engine/arg_utils.py", "EngineArgs"): {"create_engine_config": "self usage_context headless"},
    ("v1/sample/logits_processor/__init__.py", "AdapterLogitsProcessor"): {
        "new_req_logits_processor": "self params",
    },
    ("config/vllm.py", ""): {
        "get_current_vllm_config": "",
        "get_current_vllm_config_or_none": "",
        "get_layers_from_vllm_config": "vllm_config layer_type layer_names",
        "set_current_vllm_config": "vllm_config check_compile prefix",
    },
    ("model_executor/models/utils.py", ""): {"extract_layer_index": "layer_name num_attn_module"},
    ("utils/torch_utils.py", ""): {"async_tensor_h2d": "data device dtype out"},
    ("utils/import_utils.py", ""): {"resolve_obj_by_qualname": "qualname"},
    ("distributed/parallel_state.py", ""): {"get_tensor_model_parallel_rank": ""},
    ("distributed/kv_transfer/kv_transfer_state.py", ""): {
        "get_kv_transfer_group": "",
        "has_kv_transfer_group": "",
        "is_v1_kv_transfer_group": "connector",
    },
    ("distributed/kv_transfer/kv_connector/v1/base.py", "KVConnectorBase_V1"): {
        "has_connector_metadata": "self",
        "save_kv_layer": "self layer_name kv_layer attn_metadata **kwargs",
        "wait_for_layer_load": "self layer_name",
    },
    ("forward_context.py", ""): {
        "get_forward_context": "",
        "set_forward_context": "attn_metadata vllm_config num_tokens num_tokens_across_dp cudagraph_runtime_mode "
        "batch_descriptor ubatch_slices slot_mapping skip_compiled is_padding",
    },
    ("v1/spec_decode/custom_class_proposer.py", ""): {"create_custom_proposer": "vllm_config"},
    ("v1/worker/utils.py", "AttentionGroup"): {"get_metadata_builder": "self ubatch_id"},
    ("v1/worker/block_table.py", "BlockTable"): {"get_cpu_tensor": "self"},
    ("v1/worker/worker_base.py", "WorkerBase"): {
        "execute_model": "self scheduler_output",
        "init_device": "self",
    },
}

# Attributes and fields that we read or set, and members that we name.
_IMPL_NAMES = (
    "num_heads head_size scale num_kv_heads alibi_slopes sliding_window logits_soft_cap "
    "kv_sharing_target_layer_name sinks"
)
NAMES: dict[tuple[str, str], str] = {
    ("v1/attention/backend.py", "AttentionBackend"): "supported_dtypes supported_kv_cache_dtypes "
    "forward_includes_kv_cache_update",
    ("v1/attention/backend.py", "AttentionImplBase"): "supports_quant_query_input supports_dcp",
    ("v1/attention/backend.py", "AttentionLayer"): "_k_scale _v_scale",
    ("v1/attention/backend.py", "AttentionMetadataBuilder"): "_cudagraph_support reorder_batch_threshold "
    "supports_update_block_table supports_draft_decode_metadata_update vllm_config",
    (
        "v1/attention/backend.py",
        "AttentionCGSupport",
    ): "ALWAYS UNIFORM_BATCH NEVER",
    ("v1/attention/backend.py", "AttentionType"): "DECODER",
    ("v1/attention/backend.py", "MultipleOf"): "base",
    ("v1/attention/backend.py", "CommonAttentionMetadata"): "query_start_loc query_start_loc_cpu seq_lens "
    "seq_lens_cpu_upper_bound num_reqs num_actual_tokens max_query_len block_table_tensor "
    "slot_mapping causal is_prefilling req_idx _num_computed_tokens_cache _token_to_req_indices_cache",
    ("v1/attention/backends/flash_attn.py", "FlashAttentionImpl"): _IMPL_NAMES,
    ("v1/attention/backends/triton_attn.py", "TritonAttentionImpl"): _IMPL_NAMES,
    (
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionBackendImpl",
    ): "num_heads head_size scale num_kv_heads alibi_slopes sliding_window logits_soft_cap sinks kv_cache_dtype "
    "is_fp8_kv_cache",
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionBackend"): "supported_dtypes",
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionMetadataBuilder"): "isa block_size",
    ("v1/attention/selector.py", "AttentionSelectorConfig"): "attn_type kv_cache_dtype head_size",
    ("v1/kv_cache_interface.py", "KVCacheSpec"): "block_size",
    ("v1/kv_cache_interface.py", "AttentionSpec"): "num_kv_heads head_size head_size_v dtype "
    "tokens_per_state page_size_bytes",
    ("v1/kv_cache_interface.py", "FullAttentionSpec"): "attention_chunk_size",
    ("v1/kv_cache_interface.py", "ChunkedLocalAttentionSpec"): "attention_chunk_size",
    ("v1/kv_cache_interface.py", "KVCacheGroupSpec"): "layer_names kv_cache_spec",
    ("v1/kv_cache_interface.py", "KVCacheConfig"): "num_blocks kv_cache_tensors kv_cache_groups",
    ("v1/kv_cache_interface.py", "MambaSpec"): "shapes dtypes mamba_type",
    ("model_executor/layers/mamba/abstract.py", "MambaBase"): "mamba_type",
    ("v1/kv_cache_layout.py", "KVCacheLayout"): "LBHNC BLHNC BLNHC",
    ("model_executor/layers/attention/attention.py", "Attention"): "impl kv_cache layer_name "
    "num_heads num_kv_heads head_size head_size_v sliding_window kv_sharing_target_layer_name",
    ("platforms/interface.py", "Platform"): "device_name device_type",
    ("config/vllm.py", "VllmConfig"): "additional_config attention_config cache_config compilation_config "
    "device_config kv_transfer_config model_config parallel_config scheduler_config speculative_config "
    "load_config lora_config mamba_config use_v2_model_runner",
    ("config/load.py", "LoadConfig"): "load_format",
    ("config/attention.py", "AttentionConfig"): "backend backend_per_kind flash_attn_version",
    ("config/cache.py", "CacheConfig"): "block_size cache_dtype gpu_memory_utilization kv_cache_memory_bytes "
    "kv_sharing_fast_prefill use_replayssm",
    ("config/kv_transfer.py", "KVTransferConfig"): "is_kv_transfer_instance kv_connector "
    "kv_connector_extra_config kv_connector_module_path",
    ("forward_context.py", "ForwardContext"): "attn_metadata",
    (
        "config/model.py",
        "ModelConfig",
    ): "dtype enable_trace_replay get_head_size is_hybrid is_mm_prefix_lm runner_type "
    "logits_processors logprobs_mode is_multimodal_model uses_mrope",
    ("sampling_params.py", "SamplingParams"): "extra_args logprobs prompt_logprobs trace_decode_token_ids",
    (
        "config/parallel.py",
        "ParallelConfig",
    ): "tensor_parallel_size pipeline_parallel_size data_parallel_size use_ubatching worker_cls",
    ("config/compilation.py", "CompilationConfig"): "static_forward_context",
    ("config/scheduler.py", "SchedulerConfig"): "max_num_seqs",
    ("config/speculative.py", "SpeculativeConfig"): "method model num_speculative_tokens draft_model_config "
    "target_model_config target_parallel_config",
    ("compilation/backends.py", ""): "model_tag",
    # Names of a batch's requests, in either model runner, and its block tables in the first.
    ("v1/core/sched/output.py", "SchedulerOutput"): "finished_req_ids",
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner"): "attn_groups input_batch",
    ("v1/worker/gpu_input_batch.py", "InputBatch"): "block_table req_ids",
    ("v1/worker/block_table.py", "MultiGroupBlockTable"): "block_tables",
    ("v1/worker/block_table.py", "BlockTable"): "block_size num_blocks_per_row",
    ("v1/worker/utils.py", "AttentionGroup"): "layer_names",
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner"): "req_states",
    ("v1/worker/gpu/states.py", "RequestState"): "index_to_req_id",
}
