"""A model under rules: dense where nothing is skipped, as decoding one token at a time, and counted."""

import pytest
import torch
import transformers
from tiny_models import SMALL, save_model
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig

from topt_vllm.attention.common import Thetas
from topt_vllm.calibration.options import CalibrationError
from topt_vllm.evaluation import attention
from topt_vllm.evaluation.attention import attending
from topt_vllm.evaluation.rules.blasst import Blasst
from topt_vllm.evaluation.rules.quest import Quest
from topt_vllm.evaluation.rules.sparsev import SparseV
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.evaluation.rules.toptheta import TopTheta
from topt_vllm.model_identity import identify

TOKENS = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
FIRST = 20
GEMMA = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gemma2, softcap": Gemma2Config(**SMALL, **GEMMA, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "gemma3, windows": Gemma3TextConfig(**SMALL, **GEMMA),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test crosses their edges."""
    monkeypatch.setattr(attention, "_CHUNK_ELEMENTS", 9000)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), request.param)
    loaded = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return loaded.eval()


def full_layers(model) -> tuple:
    identity = identify(model.config, "tiny")
    return identity, [layer for layer in range(3) if layer not in identity.sliding_window_layers]


def thetas(layers: list[int]) -> TopTheta:
    entry = Thetas(torch.tensor([FIRST, 90]), torch.tensor([[0.5, 1.0]] * 4), torch.zeros(4, 2))
    return TopTheta(dict.fromkeys(layers, entry))


def hidden(model, rules, **arguments):
    identity, _ = full_layers(model)
    with torch.inference_mode(), attending(model, identity, rules, FIRST, window=32) as counts:
        return model(TOKENS, use_cache=False).last_hidden_state, counts


@pytest.mark.parametrize("rule", [None, TopK(90), Quest(6), Blasst(0.0), SparseV(1e-30)], ids=str)
def test_a_rule_that_keeps_everything_changes_nothing(model, rule):
    _, layers = full_layers(model)
    with torch.inference_mode():
        expected = model(TOKENS, use_cache=False).last_hidden_state
    found, counts = hidden(model, {} if rule is None else dict.fromkeys(layers, rule))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counts.v_rows_read == counts.v_rows
    assert counts.elements_kept == counts.elements == 2 * counts.v_rows
    assert counts.dropped == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "make", [thetas, lambda layers: TopK(5), lambda layers: Quest(2)], ids=["θ", "k", "pages"]
)
def test_one_pass_is_decoding_one_token_at_a_time(model, make):
    identity, layers = full_layers(model)
    rules = dict.fromkeys(layers, make(layers))
    found, counts = hidden(model, rules)
    steps = []
    with torch.inference_mode(), attending(model, identity, rules, FIRST, window=32) as stepped:
        cache = transformers.DynamicCache(config=model.config)
        for position in range(90):
            token = TOKENS[:, position : position + 1]
            steps.append(model(token, past_key_values=cache, use_cache=True).last_hidden_state)
    torch.testing.assert_close(found, torch.cat(steps, dim=1), rtol=1e-3, atol=1e-3)
    assert (stepped.v_rows, stepped.elements, stepped.sparse) == (
        counts.v_rows,
        counts.elements,
        counts.sparse,
    )
    assert stepped.v_rows_read == counts.v_rows_read < counts.v_rows
    assert stepped.dropped == pytest.approx(counts.dropped, rel=1e-3)


def test_rows_after_a_dense_prompt_attend_by_the_rule(model):
    """A cache filled densely, then several rows at once: as needles are answered."""
    identity, layers = full_layers(model)
    rules = dict.fromkeys(layers, TopK(5))
    results = []
    for split in (1, 4):
        cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            model(TOKENS[:, :80], past_key_values=cache, use_cache=True)
            with attending(model, identity, rules, FIRST):
                parts = TOKENS[:, 80:88].split(split, dim=1)
                found = [
                    model(part, past_key_values=cache, use_cache=True).last_hidden_state for part in parts
                ]
        results.append(torch.cat(found, dim=1))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


def test_every_layer_is_counted_and_rows_below_the_first_context_are_not(model):
    identity, layers = full_layers(model)
    _, counts = hidden(model, {layers[-1]: TopK(1)})
    contexts = torch.arange(FIRST, 91)
    windowed = len(identity.sliding_window_layers) * int(contexts.clamp(max=32).sum())
    assert counts.v_rows == 2 * (len(layers) * int(contexts.sum()) + windowed)
    assert counts.elements == 2 * counts.v_rows
    assert counts.sparse == 4 * len(contexts)
    # The layer with the rule reads one or two rows of each context, the others all of them.
    others = counts.v_rows - 2 * int(contexts.sum())
    assert others + 2 * len(contexts) <= counts.v_rows_read <= others + 4 * len(contexts)
    assert counts.elements_kept == 2 * others + 4 * len(contexts)
    assert counts.shares()["v_rows_read"] == counts.v_rows_read / counts.v_rows


def test_a_rule_for_a_layer_that_cannot_have_one(model):
    identity, _ = full_layers(model)
    wrong = (identity.sliding_window_layers or [3])[0]
    with (
        pytest.raises(ValueError, match=rf"\[{wrong}\], which can't have one"),
        attending(model, identity, {wrong: TopK(1)}, 1),
    ):
        pass


def test_a_window_that_the_configuration_does_not_name(tmp_path):
    folder = save_model(tmp_path, CONFIGS["gemma3, windows"])
    model = transformers.AutoModel.from_pretrained(folder)
    claimed = identify(model.config, "tiny").model_copy(update={"sliding_window_layers": []})
    with (
        torch.inference_mode(),
        attending(model, claimed, {}, 1),
        pytest.raises(CalibrationError, match="layer 0 attends with sliding_window=32"),
    ):
        model(TOKENS, use_cache=False)
