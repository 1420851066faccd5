"""Metadata builder and implementation on vLLM's CPU cache, without an engine."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device import interpreter_only

pytest.importorskip("vllm")

from transformers import LlamaConfig
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from topt_vllm.attention import reference
from topt_vllm.attention.common import DecodeBatch, Policy, Stat, Thetas
from topt_vllm.backend.page import Tail

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 64, 128, 32
SCALE = HEAD_DIM**-0.5
LAYER = "model.layers.1.self_attn.attn"


@dataclass
class BatchSpec:
    """One step: context length (this step's tokens included) and query length of every request."""

    name: str
    seq_lens: list[int]
    query_lens: list[int]

    def __str__(self) -> str:
        return self.name


BATCHES = [
    BatchSpec("single_decode", [300], [1]),
    BatchSpec("ragged_decode", [1, 128, 129, 700], [1, 1, 1, 1]),
    BatchSpec("prefill_only", [130, 40], [130, 40]),
    BatchSpec("mixed", [256, 511, 90], [1, 1, 90]),
    BatchSpec("mixed_chunked_prefill", [640, 400], [1, 150]),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaConfig(
        hidden_size=256,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm_config(model_folder: Path) -> Iterator[Any]:
    load_general_plugins()
    current_platform.import_kernels()
    config = EngineArgs(
        model=str(model_folder),
        attention_backend="TOPTHETA",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        additional_config={"toptheta": {"thresholds": "none"}},
    ).create_engine_config()
    with set_current_vllm_config(config):
        yield config


def build(
    vllm_config: Any, policy: Policy | None = None, thetas: Thetas | None = None, **options: Any
) -> Any:
    """A builder and an attention layer bound to it, as the engine would make them."""
    context = vllm_config.compilation_config.static_forward_context
    context.clear()
    with set_default_torch_dtype(torch.bfloat16):
        layer = Attention(NUM_HEADS, HEAD_DIM, SCALE, NUM_KV_HEADS, prefix=LAYER, **options)
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
    )
    builder = layer.attn_backend.get_builder_cls()(spec, [LAYER], vllm_config, torch.device("cpu"))
    if policy is not None:
        layer.impl.bound.policy = policy
    layer.impl.bound.thetas = thetas
    return builder, layer


def common_metadata(batch: BatchSpec, block_table: torch.Tensor) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *torch.tensor(batch.query_lens).cumsum(0).tolist()], dtype=torch.int32)
    slots = []
    for request, (seq_len, query_len) in enumerate(zip(batch.seq_lens, batch.query_lens, strict=True)):
        positions = torch.arange(seq_len - query_len, seq_len)
        slots.append(
            block_table[request, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        )
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(batch.seq_lens, dtype=torch.int32),
        num_reqs=len(batch.seq_lens),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(batch.query_lens),
        max_seq_len=max(batch.seq_lens),
        block_table_tensor=block_table,
        slot_mapping=torch.cat(slots),
    )


def fill_contexts(
    builder: Any, layer: Any, batch: BatchSpec, block_table: torch.Tensor, kv_cache: torch.Tensor
) -> None:
    """Writes the tokens of earlier steps, as prefill steps would have."""
    earlier = [
        seq_len - query_len for seq_len, query_len in zip(batch.seq_lens, batch.query_lens, strict=True)
    ]
    for request, length in enumerate(earlier):
        if length:
            step(
                builder,
                layer,
                BatchSpec("earlier", [length], [length]),
                block_table[request : request + 1],
                kv_cache,
            )


def step(
    builder: Any, layer: Any, batch: BatchSpec, block_table: torch.Tensor, kv_cache: torch.Tensor
) -> Any:
    """One step of one layer; returns its query rows and output."""
    common = common_metadata(batch, block_table)
    metadata = builder.build(0, common)
    rows = common.num_actual_tokens
    query = torch.randn(rows, NUM_HEADS, HEAD_DIM).bfloat16()
    key, value = torch.randn(2, rows, NUM_KV_HEADS, HEAD_DIM).bfloat16()
    layer.impl.do_kv_cache_update(layer, key, value, kv_cache, common.slot_mapping)
    output = torch.full_like(query, torch.nan)
    layer.impl.forward(layer, query, key, value, kv_cache, metadata, output)
    return query, output, metadata


def new_cache(tail: Tail | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned cache and a scattered block table [requests, blocks].

    The poison is finite: vLLM's prefill kernel multiplies slots beyond the context by zero. The operator's own
    tests use NaN.
    """
    content = NUM_KV_HEADS * BLOCK_SIZE * 2 * HEAD_DIM
    pages = torch.full(
        (NUM_BLOCKS, content + (tail or Tail(NUM_KV_HEADS, HEAD_DIM)).bytes // 2), 1000.0
    ).bfloat16()
    kv_cache = pages[:, :content].view(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
    return kv_cache, torch.randperm(NUM_BLOCKS, dtype=torch.int32).view(4, 8)


def reference_output(
    layer: Any,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DecodeBatch,
    value_sums: torch.Tensor | None,
) -> torch.Tensor:
    bound = layer.impl.bound
    cache = bound.paged_cache(kv_cache)
    cache = replace(cache, value_sums=value_sums)
    out = torch.empty_like(query, dtype=torch.float32)
    reference.decode(query, cache, batch, bound.thetas, bound.policy, SCALE, 0.0, out, None)
    return out


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_every_row_kept_is_dense_attention(vllm_config: Any, batch: BatchSpec):
    """θ = −inf on any batch equals the reference run as dense attention over all rows, prefill rows included."""
    torch.manual_seed(0)
    builder, layer = build(vllm_config)
    kv_cache, block_table = new_cache()
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    query, output, _ = step(builder, layer, batch, block_table, kv_cache)
    common = common_metadata(batch, block_table)
    rows = DecodeBatch(common.query_start_loc, common.seq_lens, block_table)
    expected = reference_output(layer, query, kv_cache, rows, None)
    # bf16 output and, in vLLM's prefill kernel, bf16 probabilities: a few units of 2^-8 of values around 1.
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("compensation", ["none", "vmean"])
def test_decode_rows_are_sparse_and_prefill_rows_are_not(
    vllm_config: Any, batch: BatchSpec, compensation: Any
):
    torch.manual_seed(1)
    lengths = torch.tensor([64, 1024], dtype=torch.int32)
    thetas = Thetas(lengths, torch.full((NUM_HEADS, 2), 1.0), torch.tensor([[1.0, 0.0]] * NUM_HEADS))
    builder, layer = build(vllm_config, Policy(compensation=compensation), thetas)
    kv_cache, block_table = new_cache()
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    layer.impl.bound.statistics.zero_()
    query, output, metadata = step(builder, layer, batch, block_table, kv_cache)
    decoded = metadata.num_decode_rows
    assert decoded == sum(length for length in batch.query_lens if length == 1)
    assert layer.impl.bound.statistics[Stat.ROWS] == decoded
    assert output.isfinite().all()
    if decoded:
        assert metadata.decode is not None
        sums = layer.impl.bound.cache.value_sums
        expected = reference_output(layer, query[:decoded], kv_cache, metadata.decode, sums)
        torch.testing.assert_close(output[:decoded].float(), expected, atol=2e-2, rtol=2e-2)
        read = layer.impl.bound.statistics[Stat.V_ROWS_READ] / layer.impl.bound.statistics[Stat.V_ROWS]
        if max(batch.seq_lens) > 4 * BLOCK_SIZE:
            assert read < 0.7


def test_value_sums_follow_rewritten_blocks(vllm_config: Any):
    """A reused block, or a rejected draft token, leaves no trace in the sum."""
    torch.manual_seed(2)
    thetas = Thetas(
        torch.tensor([1], dtype=torch.int32), torch.zeros(NUM_HEADS, 1), torch.zeros(NUM_HEADS, 2)
    )
    builder, layer = build(vllm_config, Policy(), thetas)
    kv_cache, block_table = new_cache()
    block_table = block_table[:1]
    for _ in range(2):
        step(builder, layer, BatchSpec("prefill", [300], [300]), block_table, kv_cache)
        cache = layer.impl.bound.paged_cache(kv_cache)
        finished = block_table[0, :2].long()
        expected = cache.value[finished].float().sum(dim=2)
        torch.testing.assert_close(cache.value_sums[finished], expected, rtol=1e-5, atol=1e-4)
    step(builder, layer, BatchSpec("decode to the last slot", [384], [84]), block_table, kv_cache)
    last = int(block_table[0, 2])
    torch.testing.assert_close(
        cache.value_sums[last], cache.value[last].float().sum(dim=1), rtol=1e-5, atol=1e-4
    )


def test_speculative_rows_decode_together(vllm_config: Any):
    torch.manual_seed(3)
    thetas = Thetas(
        torch.tensor([1], dtype=torch.int32), torch.full((NUM_HEADS, 1), 0.5), torch.tensor([[0.5, 0.0]] * 4)
    )
    builder, layer = build(vllm_config, Policy(), thetas)
    builder.reorder_batch_threshold = 5
    kv_cache, block_table = new_cache()
    batch = BatchSpec("verify", [258, 131, 600], [5, 3, 1])
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    query, output, metadata = step(builder, layer, batch, block_table, kv_cache)
    assert metadata.num_decode_rows == 9
    assert metadata.decode_lengths.tolist() == [254, 255, 256, 257, 258, 129, 130, 131, 600]
    expected = reference_output(layer, query, kv_cache, metadata.decode, layer.impl.bound.cache.value_sums)
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("alibi_slopes", [0.5] * NUM_HEADS), ("sinks", torch.zeros(NUM_HEADS))],
    ids=["alibi", "sinks"],
)
def test_unsupported_layers_are_refused_by_name(vllm_config: Any, option: str, value: Any):
    with pytest.raises((NotImplementedError, ValueError), match=option):
        build(vllm_config, **{option: value})


def test_sliding_window_layers_stay_with_vllm_and_are_counted(vllm_config: Any):
    from topt_vllm.backend.metrics import recorder

    torch.manual_seed(4)
    builder, layer = build(vllm_config, per_layer_sliding_window=64)
    kv_cache, block_table = new_cache()
    batch = BatchSpec("decode", [300, 20], [1, 1])
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    before = recorder().totals()
    _, output, _ = step(builder, layer, batch, block_table, kv_cache)
    after = recorder().totals()
    assert output.isfinite().all()
    assert after["dense_rows:sliding_window"] - before.get("dense_rows:sliding_window", 0) == 2
    assert (
        after["toptheta:v_rows_read_total"] - before["toptheta:v_rows_read_total"] == (64 + 20) * NUM_KV_HEADS
    )


def test_tensor_parallel_ranks_take_their_own_heads(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    import vllm.distributed

    from topt_vllm.backend.layers import bind_layer
    from topt_vllm.backend.startup import resolve

    _, layer = build(vllm_config)
    resolved = resolve(vllm_config)
    theta = torch.arange(NUM_HEADS, dtype=torch.float32)[:, None]
    whole = Thetas(torch.tensor([1], dtype=torch.int32), theta, theta.expand(-1, 2))
    resolved.thetas[1] = whole
    layer.impl.num_heads = NUM_HEADS // 2
    for rank, heads in enumerate(([0.0, 1.0], [2.0, 3.0])):
        monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        bind_layer(layer, LAYER, resolved, BLOCK_SIZE, tensor_parallel_size=2)
        assert layer.impl.bound.thetas.theta[:, 0].tolist() == heads
    with pytest.raises(ValueError, match="divides the heads"):
        bind_layer(layer, LAYER, resolved, BLOCK_SIZE, tensor_parallel_size=3)


@pytest.mark.parametrize(("runner", "rows"), [("generate", [300, 200]), ("pooling", [])])
def test_pooled_prompts_are_dense_to_their_last_token(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, runner: str, rows: list[int]
):
    """A prompt's last chunk may be a single token. Where tokens are generated, it decodes, as vLLM has it."""
    monkeypatch.setattr(vllm_config.model_config, "runner_type", runner)
    builder, _ = build(vllm_config)
    _, block_table = new_cache()
    ends = torch.tensor([True, True, True])
    for batch in (BatchSpec("ends", [300, 200, 40], [1, 1, 40]), BatchSpec("only ends", [300, 200], [1, 1])):
        common = common_metadata(batch, block_table)
        metadata = builder.build(0, common.replace(is_prefilling=ends[: len(batch.seq_lens)]))
        assert metadata.decode_lengths.tolist() == rows


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_fp8_caches_are_read_as_vllm_writes_them(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, name: str, sparse: bool
):
    """With scales that are no powers of two; the prefill rows are vLLM's own reading of the same cache."""
    from topt_vllm.backend.layers import bind_layer
    from topt_vllm.backend.startup import resolve

    torch.manual_seed(7)
    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", name)
    thetas = Thetas(
        torch.tensor([1], dtype=torch.int32), torch.ones(NUM_HEADS, 1), torch.tensor([[1.0, 0]] * 4)
    )
    builder, layer = build(vllm_config, cache_config=vllm_config.cache_config)
    layer._k_scale_float, layer._v_scale_float = 0.043, 0.031
    bind_layer(layer, LAYER, resolve(vllm_config), BLOCK_SIZE, tensor_parallel_size=1)
    layer.impl.bound.thetas = thetas if sparse else None
    content, tail = NUM_KV_HEADS * BLOCK_SIZE * 2 * HEAD_DIM, layer.impl.bound.tail.bytes
    pages = torch.full((NUM_BLOCKS, content + tail), 0x55, dtype=torch.uint8)
    kv_cache = pages[:, :content].view(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
    block_table = torch.randperm(NUM_BLOCKS, dtype=torch.int32).view(4, 8)
    batch = BatchSpec("mixed", [300, 511, 90], [1, 1, 90])
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    layer.impl.bound.statistics.zero_()
    query, output, metadata = step(builder, layer, batch, block_table, kv_cache)
    cache, statistics = layer.impl.bound.cache, layer.impl.bound.statistics
    assert cache.key.dtype == (torch.float8_e5m2 if name == "fp8_e5m2" else torch.float8_e4m3fn)
    expected = reference_output(layer, query[:2], kv_cache, metadata.decode, cache.value_sums)
    torch.testing.assert_close(output[:2].float(), expected, atol=2e-2, rtol=2e-2)
    read = statistics[Stat.V_ROWS_READ] / statistics[Stat.V_ROWS]
    assert read < 0.6 if sparse else read == 1
    layer.impl.bound.thetas = None
    common = common_metadata(batch, block_table)
    rows = DecodeBatch(common.query_start_loc[2:] - 2, common.seq_lens[2:], block_table[2:])
    expected = reference_output(layer, query[2:], kv_cache, rows, None)
    torch.testing.assert_close(output[2:].float(), expected, atol=2e-2, rtol=2e-2)


def test_a_screen_of_an_fp8_cache_is_refused(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", "fp8")
    monkeypatch.setitem(vllm_config.additional_config["toptheta"], "k_screen", "int8")
    with pytest.raises(ValueError, match="k_screen is 'int8' and the cache 'fp8'"):
        build(vllm_config, cache_config=vllm_config.cache_config)


@pytest.mark.slow
@interpreter_only
def test_the_triton_kernel_reads_the_cpu_cache(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    """It takes strides, so under Triton's interpreter it can take the place of the CPU kernel."""
    settings = vllm_config.additional_config["toptheta"]
    thetas = Thetas(
        torch.tensor([1], dtype=torch.int32), torch.zeros(NUM_HEADS, 1), torch.zeros(NUM_HEADS, 2)
    )
    outputs = []
    for name in ("cpu", "triton"):
        torch.manual_seed(6)
        monkeypatch.setitem(settings, "implementation", name)
        builder, layer = build(vllm_config, Policy(), thetas)
        kv_cache, block_table = new_cache()
        batch = BatchSpec("mixed", [300, 140, 20], [1, 1, 20])
        fill_contexts(builder, layer, batch, block_table, kv_cache)
        outputs.append(step(builder, layer, batch, block_table, kv_cache)[1])
        read = layer.impl.bound.statistics[Stat.V_ROWS_READ] / layer.impl.bound.statistics[Stat.V_ROWS]
        assert 0.3 < read < 0.95
    torch.testing.assert_close(outputs[1].float(), outputs[0].float(), atol=2e-2, rtol=2e-2)


def test_key_screen_travels_in_the_page_and_keeps_the_same_rows(vllm_config: Any):
    """The same steps with and without the 8-bit copy: same counts, and K of dropped keys is not read."""
    thetas = Thetas(
        torch.tensor([1], dtype=torch.int32), torch.full((NUM_HEADS, 1), 2.0), torch.tensor([[2.0, 0.0]] * 4)
    )
    outcomes = []
    for screen in ("off", "int8"):
        torch.manual_seed(5)
        vllm_config.additional_config["toptheta"]["k_screen"] = screen
        builder, layer = build(vllm_config, Policy(), thetas)
        kv_cache, block_table = new_cache(layer.impl.bound.tail)
        batch = BatchSpec("decode", [900, 300], [1, 1])
        fill_contexts(builder, layer, batch, block_table, kv_cache)
        layer.impl.bound.statistics.zero_()
        _, output, _ = step(builder, layer, batch, block_table, kv_cache)
        outcomes.append((output, layer.impl.bound.statistics))
    del vllm_config.additional_config["toptheta"]["k_screen"]
    (plain, counted), (screened, counted_screened) = outcomes
    exact = [Stat.ROWS, Stat.ELEMENTS, Stat.KEPT_ELEMENTS, Stat.V_ROWS, Stat.V_ROWS_READ]
    assert counted[exact].tolist() == counted_screened[exact].tolist()
    assert counted_screened[Stat.K_ROWS_READ] < counted[Stat.K_ROWS_READ]
    torch.testing.assert_close(screened.float(), plain.float(), atol=2e-2, rtol=2e-2)


def test_a_screen_asks_for_larger_pages_and_its_cost_is_logged(
    vllm_config: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from topt_vllm.backend.backend import TopThetaBackend

    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
    )
    content = spec.unpadded_page_size_bytes
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    pages = {}
    for screen in ("off", "int8"):
        monkeypatch.setitem(vllm_config.additional_config["toptheta"], "k_screen", screen)
        with caplog.at_level(logging.INFO):
            _, layer = build(vllm_config)
        pages[screen] = TopThetaBackend.customize_spec(spec).page_size_bytes
        tail = layer.impl.bound.tail.bytes
        assert pages[screen] == content + tail
        share = f"{tail / pages[screen]:.1%} of each cache page, {tail} bytes per block"
        assert f"{'V sums and int8 copy of K' if screen == 'int8' else 'V sums'}: {share}" in caplog.text
    assert content < pages["off"] < 1.02 * content
    assert 1.2 * content < pages["int8"] < 1.3 * content


def test_a_single_token_is_not_charged_for_a_whole_block():
    """vLLM sizes hybrid models' blocks from what one token takes."""
    spec = FullAttentionSpec(block_size=1, num_kv_heads=2, head_size=256, dtype=torch.bfloat16)
    assert Tail(2, 256).extend(spec) == spec
    block = replace(spec, block_size=64)
    assert Tail(2, 256).extend(block).page_size_bytes == block.page_size_bytes + 2 * 256 * 4


def test_thresholds_follow_the_traffic(vllm_config: Any):
    """Too many keys are kept at first, so that θ rises from the second step on, and fewer are."""
    from dataclasses import replace

    from topt_vllm.adaptation import ROWS
    from topt_vllm.backend.layers import bind_layer
    from topt_vllm.backend.startup import resolve

    torch.manual_seed(8)
    builder, layer = build(vllm_config)
    thetas = Thetas(
        torch.tensor([1], dtype=torch.int32), torch.zeros(NUM_HEADS, 1), torch.zeros(NUM_HEADS, 2)
    )
    resolved = replace(resolve(vllm_config), thetas={1: thetas}, promised_keys={1: [40, 40, 40, 600]})
    bind_layer(layer, LAYER, resolved, BLOCK_SIZE, tensor_parallel_size=1)
    bound = layer.impl.bound
    kv_cache, block_table = new_cache()
    batch = BatchSpec("verify", [900] * 4, [1] * 4)
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    for _ in range(ROWS // 4):
        assert bound.controller.offset.tolist() == [0] * NUM_HEADS
        step(builder, layer, batch, block_table, kv_cache)
    # Half of 900 random scores are positive; the last head is asked for half of them too, not for 600.
    assert (bound.controller.offset[:3] > 0.1).all()
    assert abs(float(bound.controller.offset[3])) < 0.05
    torch.testing.assert_close(bound.thetas.theta[:, 0], bound.controller.offset)
    assert thetas.theta.abs().max() == 0
    before = bound.statistics[Stat.KEPT_ELEMENTS].clone()
    step(builder, layer, batch, block_table, kv_cache)
    assert bound.statistics[Stat.KEPT_ELEMENTS] - before < 4 * NUM_HEADS * 440


def test_sift_finds_thresholds_by_request(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    """Dense while warming up, sparse afterwards; a request keeps its thresholds in another place of the batch."""
    from types import SimpleNamespace

    from topt_vllm.backend import requests
    from topt_vllm.backend.metrics import recorder

    torch.manual_seed(9)
    settings = {"policy": "sift", "sift_tau": 0.9, "sift_warmup": 2}
    monkeypatch.setitem(vllm_config.additional_config, "toptheta", settings)
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b", "c", "d"]))
    monkeypatch.setattr(requests, "_runner", runner)
    builder, layer = build(vllm_config)
    bound = layer.impl.bound
    kv_cache, block_table = new_cache()
    batch = BatchSpec("verify", [900] * 4, [1] * 4)
    fill_contexts(builder, layer, batch, block_table, kv_cache)
    requests.ended(["a", "b", "c", "d"])  # prefilled one after the other, all as request a
    dense = recorder().totals().get("dense_rows:sift_warmup", 0)
    for _ in range(2):
        *_, metadata = step(builder, layer, batch, block_table, kv_cache)
        assert metadata.sift.warm.all()
    assert recorder().totals()["dense_rows:sift_warmup"] - dense == 8
    assert bound.statistics[Stat.KEPT_ELEMENTS] == bound.statistics[Stat.ELEMENTS] > 0

    before = bound.statistics.clone()
    *_, metadata = step(builder, layer, batch, block_table, kv_cache)
    assert not metadata.sift.warm.any()
    kept, elements = (bound.statistics - before)[[Stat.KEPT_ELEMENTS, Stat.ELEMENTS]]
    assert 0.05 < kept / elements < 0.25  # a tenth, and the unfinished block
    laws = bound.sift.thetas(metadata.sift).theta
    runner.input_batch.req_ids = ["d", "e", "a", "b"]
    requests.ended(["c"])
    *_, metadata = step(builder, layer, batch, block_table, kv_cache)
    assert metadata.sift.warm.tolist() == [False, True, False, False]
    theta = bound.sift.thetas(metadata.sift).theta
    assert torch.equal(theta[[0, 2, 3]], laws[[3, 0, 1]])
    assert (theta[1] == -torch.inf).all()


def test_sift_needs_a_worker_that_names_requests(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    from topt_vllm.backend import requests

    monkeypatch.setitem(vllm_config.additional_config, "toptheta", {"policy": "sift"})
    monkeypatch.setattr(requests, "_runner", None)
    builder, layer = build(vllm_config)
    kv_cache, block_table = new_cache()
    with pytest.raises(RuntimeError, match="policy sift needs TOPTHETA's worker"):
        step(builder, layer, BatchSpec("decode", [1], [1]), block_table, kv_cache)


def test_a_rank_adapts_its_own_heads(vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    import vllm.distributed

    from topt_vllm.backend.layers import bind_layer
    from topt_vllm.backend.startup import resolve

    _, layer = build(vllm_config)
    thetas = Thetas(torch.tensor([1], dtype=torch.int32), torch.zeros(4, 1), torch.zeros(4, 2))
    resolved = replace(resolve(vllm_config), thetas={1: thetas}, promised_keys={1: [10, 20, 30, 40]})
    layer.impl.num_heads = NUM_HEADS // 2
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 1)
    bind_layer(layer, LAYER, resolved, BLOCK_SIZE, tensor_parallel_size=2)
    controller = layer.impl.bound.controller
    controller.count(torch.tensor([[30, 80]]).expand(32, 2), torch.full((32,), 1000))
    assert controller.offset[0] == 0
    assert controller.offset[1] > 0


def test_extrapolation_is_logged_once_and_when_it_happens(
    vllm_config: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from topt_vllm.backend.rows import ExtrapolationNotice

    torch.manual_seed(9)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    builder, layer = build(vllm_config)
    builder._extrapolation = ExtrapolationNotice(512)
    kv_cache, block_table = new_cache()
    with caplog.at_level(logging.INFO):
        for seq_len, notices in ((512, 0), (513, 1), (700, 1)):
            step(builder, layer, BatchSpec("decode", [seq_len, 20], [1, 1]), block_table, kv_cache)
            # A record may be seen by several handlers.
            found = {text for text in caplog.messages if "extrapolated by each head's fitted law" in text}
            assert len(found) == notices
    assert "513 tokens is longer than the table's 512" in found.pop()
