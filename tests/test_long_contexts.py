"""vLLM's attention in replays: what torch's computes, wherever it is taken."""

from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import save_model

from topt_vllm import vllm_cpu_attention
from topt_vllm.replay import capture, dense_pass, long_contexts
from topt_vllm.replay.capture import Asked, whole_sequence
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.long_contexts import attend_by_vllm
from topt_vllm.replay.model import Subject
from topt_vllm.replay.rule import attend
from topt_vllm.replay.scores import LayerCall
from topt_vllm.table.identity import identify

# Relative to the largest output.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def long(monkeypatch):
    """Passes of any length are long."""
    monkeypatch.setattr(long_contexts, "_LONG", 1)


@pytest.fixture(autouse=True, scope="module")
def _installed():
    if vllm_cpu_attention.choose(torch.float32, 128, 64) is None:
        pytest.skip("vLLM for CPU is not installed")


def call_of(heads: int, kv_heads: int, length: int, head_dim: int, dtype=torch.float32, scale=None, **more):
    generator = torch.Generator().manual_seed(length)
    # As projections hand them on: one row's heads lie side by side.
    query, key, value = (
        torch.randn(length, count, head_dim, generator=generator).to(dtype).transpose(0, 1)
        for count in (heads, kv_heads, kv_heads)
    )
    return LayerCall(0, query, key, value, scale or head_dim**-0.5, **more)


def check(call: LayerCall, rounding: float = 0.0) -> None:
    """`rounding`: what more may part two orders of adding up."""
    found = attend_by_vllm(call)
    assert found is not None
    expected = attend(call, None).transpose(0, 1)[None]
    assert found.shape == expected.shape
    assert found.dtype == call.query.dtype
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= TOLERANCES[call.query.dtype] + rounding


@pytest.mark.parametrize("length", [1, 2, 31, 127, 128, 129, 700])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_lengths_around_blocks(length, dtype):
    check(call_of(9, 3, length, 64, dtype))


@pytest.mark.parametrize(("length", "first"), [(300, 299), (300, 130), (257, 1), (128, 127)])
def test_last_rows_behind_a_prompt(length, first):
    whole = call_of(9, 3, length, 64)
    check(replace(whole, query=whole.query[:, first:], first=first))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 32), (8, 1, 80), (32, 8, 128), (6, 2, 96), (12, 1, 256), (2, 1, 112)],
)
def test_kinds_of_heads(heads, kv_heads, head_dim):
    check(call_of(heads, kv_heads, 300, head_dim))


@pytest.mark.parametrize(
    "laid",
    [torch.Tensor.contiguous, lambda heads: heads.mT.contiguous().mT],
    ids=["heads apart", "channels apart"],
)
def test_heads_however_they_lie(laid):
    call = call_of(9, 3, 150, 64)
    check(replace(call, query=laid(call.query), key=laid(call.key), value=laid(call.value)))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 40.0])
def test_scores_from_flat_to_one_key_that_has_all(scale):
    call = call_of(4, 2, 260, 64, scale=scale)
    scores = scale * call.query @ call.key.repeat_interleave(2, dim=0).mT
    # An exponential is as exact as its argument, and scores in the hundreds are rounded to 2^-24 of their size.
    check(call, float(scores.abs().max()) * 2**-24)


def test_keys_and_values_far_from_one():
    """Of the size of real models' outliers; rows whose first key outweighs all the others."""
    call = call_of(4, 2, 260, 64)
    call.key[:, 0] *= 300
    call.value[:, 5] *= 1e6
    call.query[:, 100] = 0
    check(call)


def test_what_torch_had_better_compute(monkeypatch):
    assert attend_by_vllm(call_of(4, 2, 60, 48)) is None  # no such kernel
    assert attend_by_vllm(call_of(4, 2, 60, 64, torch.float64)) is None
    call = call_of(4, 2, 60, 64)
    assert attend_by_vllm(replace(call, value=call.value[..., :32])) is None
    assert attend_by_vllm(replace(call, window=20)) is None
    monkeypatch.setattr(long_contexts, "_LONG", 61)
    assert attend_by_vllm(call) is None


def test_amx_has_torch_s_attention(monkeypatch):
    """Not measured against vLLM's; what takes its tiles needs Linux' leave besides."""
    found = vllm_cpu_attention.CpuAttention("amx")
    monkeypatch.setattr(vllm_cpu_attention, "choose", lambda *_: found)
    long_contexts._attention.cache_clear()
    try:
        assert attend_by_vllm(call_of(4, 2, 60, 64, torch.bfloat16)) is None
    finally:
        long_contexts._attention.cache_clear()


@pytest.mark.parametrize(
    "more",
    [{"position_bias": torch.zeros(1, 4, 60, 60)}, {"is_causal": False}],
    ids=lambda more: next(iter(more)),
)
def test_a_layer_that_asks_for_more_has_torch_s_attention(more):
    call = call_of(4, 4, 60, 64)
    asked = Asked(
        torch.nn.Identity(), call.query[None], call.key[None], call.value[None], None, call.scale, None, more
    )
    found = whole_sequence(asked, call)
    expected = asked.by_torch(call.query[None], call.key[None], call.value[None], None)
    assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        max_position_embeddings=512,
    )
    folder = save_model(tmp_path_factory.mktemp("model"), config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether each call was vLLM's."""
    found = []

    def told(call: LayerCall) -> torch.Tensor | None:
        out = attend_by_vllm(call)
        found.append(out is not None)
        return out

    for module in (capture, dense_pass):
        monkeypatch.setattr(module, "attend_by_vllm", told)
    return found


def test_a_replay_s_outputs_are_the_model_s(model, taken):
    """Of its dense pass, and of rows run again behind it."""
    tokens = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    rows = range(300, 400)
    with torch.inference_mode():
        expected = model.base_model(tokens)[0]
    dense = DensePass(model, Subject(identify(model.config, "tiny"), 0, 257), tokens[0].tolist(), (rows,))
    # Scores of this model are loud: sums of float32 in another order show.
    near = {"rtol": 0, "atol": 1e-3 * expected.std().item()}
    torch.testing.assert_close(dense.hidden(rows), expected[:, 300:], **near)
    torch.testing.assert_close(dense.decode(tokens[:, 300:], 300), expected[:, 300:], **near)
    assert taken == [True] * 6
