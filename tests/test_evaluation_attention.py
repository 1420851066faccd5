"""Rules in a replay: dense where nothing is skipped, as decoding one token at a time, and counted."""

import pytest
import torch
import transformers
from tiny_models import KINDS, save_model

from topt_vllm.attention.common import Thetas
from topt_vllm.evaluation.rules.blasst import Blasst
from topt_vllm.evaluation.rules.quest import Quest
from topt_vllm.evaluation.rules.sparsev import SparseV
from topt_vllm.evaluation.rules.topk import TopK
from topt_vllm.replay import capture, scores
from topt_vllm.replay.attention import Counts, RuleAttention
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import Subject
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.replay import Replay, replayed_rows
from topt_vllm.replay.rule import attend
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.identity import identify

N, ROWS, WINDOW = 90, 50, 32
TOKENS = torch.randint(0, 256, (N,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test crosses their edges and uses several threads."""
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", 9000)
    monkeypatch.setattr(capture, "_MASKED_ROWS", 20)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model(request, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), request.param)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return loaded.eval()


def subject_of(model) -> Subject:
    identity = identify(model.config, "tiny")
    return Subject(identity, WINDOW if identity.sliding_window_layers else 0, 257)


def thetas(layers: list[int]) -> TopTheta:
    entry = Thetas(torch.tensor([20, N]), torch.tensor([[0.5, 1.0]] * 4), torch.zeros(4, 2))
    return TopTheta(dict.fromkeys(layers, entry))


def attention(subject: Subject, rule, contexts: torch.Tensor, **more) -> RuleAttention:
    rules = dict.fromkeys(subject.full_layers, rule)
    return RuleAttention(subject, rules, contexts, **more)


def decoded(model, rule, first: int, steps: list[int]) -> tuple[torch.Tensor, list[RuleAttention]]:
    """The decoder's output for rows after a dense prompt of ``first`` tokens, decoded in ``steps``."""
    subject = subject_of(model)
    dense = DensePass(model, subject, TOKENS.tolist())
    outputs, used = [], []
    for stop in steps:
        used.append(attention(subject, rule, torch.arange(first + 1, stop + 1)))
        outputs.append(dense.decode(TOKENS[None, first:stop], first, used[-1]))
    return outputs[-1], used


@pytest.mark.parametrize("rule", [TopK(N), Quest(6), Blasst(0.0), SparseV(1e-30)], ids=str)
def test_a_rule_that_keeps_everything_changes_nothing(model, rule):
    with torch.inference_mode():
        expected = model.base_model(TOKENS[None], use_cache=False).last_hidden_state[:, N - ROWS :]
    found, (used,) = decoded(model, rule, N - ROWS, [N])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    counts = used.counts
    assert counts.v_rows == counts.v_rows_read
    assert counts.elements_kept == counts.elements == 2 * counts.v_rows
    assert counts.dropped == pytest.approx(0, abs=1e-3)


class Stepper:
    """A rule's attention for single tokens behind a cache that earlier tokens filled."""

    def __init__(self, subject: Subject, rule) -> None:
        self.subject, self.rule = subject, rule

    def __call__(self, asked):
        n = asked.key.shape[2]
        windowed = asked.layer in self.subject.identity.sliding_window_layers
        call = asked.call(first=n - 1, window=WINDOW if windowed else 0)
        if windowed:
            return attend(call, None).transpose(0, 1)[None]
        used = attention(self.subject, self.rule, torch.tensor([n]))
        return used.attend(call).transpose(0, 1)[None]


@pytest.mark.parametrize(
    "make", [thetas, lambda layers: TopK(5), lambda layers: Quest(2)], ids=["θ", "k", "pages"]
)
def test_rows_at_once_are_decoding_one_token_at_a_time(model, make):
    """Each decoded row sees dense K and V of the prompt, and those that sparse rows before it made."""
    from topt_vllm.replay.capture import selected

    subject, first = subject_of(model), N - 12
    rule = make(subject.full_layers)
    found, _ = decoded(model, rule, first, [N])
    cache, steps = transformers.DynamicCache(), []
    with torch.inference_mode():
        model.base_model(TOKENS[None, :first], past_key_values=cache, use_cache=True)
        with selected(model.base_model, Stepper(subject, rule)):
            for position in range(first, N):
                token = TOKENS[None, position : position + 1]
                steps.append(model.base_model(token, past_key_values=cache, use_cache=True)[0])
    torch.testing.assert_close(found, torch.cat(steps, dim=1), rtol=1e-3, atol=1e-3)


def test_continuations_in_a_batch_do_not_see_each_other(model):
    subject = subject_of(model)
    dense = DensePass(model, subject, TOKENS[:60].tolist())
    inputs = torch.stack([TOKENS[60:66], TOKENS[70:76]])
    contexts = torch.arange(61, 67)
    both = dense.decode(inputs, 60, attention(subject, TopK(5), contexts))
    alone = [dense.decode(row[None], 60, attention(subject, TopK(5), contexts)) for row in inputs]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_windows_of_one_pass_are_replays_of_shorter_sequences(model):
    """A window that ends early in a long dense pass predicts as if the sequence ended there."""
    subject, tokens = subject_of(model), TOKENS.tolist()
    long = DensePass(model, subject, tokens[:-1], (replayed_rows(60, 9), replayed_rows(N, 9)))
    for length in (60, N):
        window = Replay(model, subject, tokens[:length], 9, long)
        alone = Replay(model, subject, tokens[:length], 9)
        assert window.rows.tolist() == alone.rows.tolist() == list(range(length - 10, length - 1))
        assert window.dense_nll == pytest.approx(alone.dense_nll, abs=1e-5)
        rule = attention(subject, TopK(3), window.rows + 1)
        again = attention(subject, TopK(3), window.rows + 1)
        first, second = window.compare(rule), alone.compare(again)
        torch.testing.assert_close(first.loss, second.loss, rtol=1e-4, atol=1e-4)
        assert rule.counts.v_rows_read == again.counts.v_rows_read


def test_every_layer_is_counted(model):
    subject = subject_of(model)
    contexts = torch.arange(N - ROWS + 1, N + 1)
    last = subject.full_layers[-1]
    used = RuleAttention(subject, {last: TopK(1)}, contexts, {last: [2, 1, 1, 1]})
    DensePass(model, subject, TOKENS.tolist()).decode(TOKENS[None, N - ROWS :], N - ROWS, used)
    counts, context = used.counts, int(contexts.sum())
    windowed = len(subject.identity.sliding_window_layers) * int(contexts.clamp(max=WINDOW).sum())
    assert counts.v_rows == 2 * (len(subject.full_layers) * context + windowed)
    assert counts.elements == 2 * counts.v_rows
    assert counts.sparse == 4 * ROWS
    # The layer with the rule reads one or two rows of each context, the others all of them.
    others = counts.v_rows - 2 * context
    assert others + 2 * ROWS <= counts.v_rows_read <= others + 4 * ROWS
    assert counts.elements_kept == 2 * others + 4 * ROWS
    assert counts.shares()["v_rows_read"] == counts.v_rows_read / counts.v_rows
    # One key of the two that head 0 was asked for, and of the one of the others.
    kept = torch.cat(used.kept_over_k[last], dim=1).flatten().sort().values
    assert kept.tolist() == [0.5] * ROWS + [1.0] * 3 * ROWS


def test_a_rule_for_a_layer_that_cannot_have_one(model):
    subject = subject_of(model)
    wrong = (subject.identity.sliding_window_layers or [3])[0]
    with pytest.raises(ValueError, match=rf"\[{wrong}\], which can't have one"):
        RuleAttention(subject, {wrong: TopK(1)}, torch.tensor([9]))


def test_a_window_that_the_configuration_does_not_name(tmp_path):
    folder = save_model(tmp_path, KINDS["gemma3, windows"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    claimed = identify(model.config, "tiny").model_copy(update={"sliding_window_layers": []})
    subject = Subject(claimed, 0, 257)
    with pytest.raises(ReplayError, match="layer 0 attends with sliding_window=32"):
        DensePass(model, subject, TOKENS.tolist())


@pytest.mark.parametrize(
    ("mask", "refused"),
    [
        (torch.ones(1, 1, 4, 4).tril().bool(), False),
        (torch.ones(1, 2, 4, 4).tril().bool(), True),
        (torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min).triu(1), False),
        (torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min).triu(1) + 0.1 * torch.eye(4), True),
        (torch.full((1, 2, 4, 4), -torch.inf).triu(1), True),
    ],
    ids=["seen", "seen by head", "added", "biases", "biases by head"],
)
def test_masks_that_say_more_than_what_is_seen_are_refused(mask, refused):
    """Thresholds would be made on scores without their biases."""
    query = torch.zeros(1, 2, 4, 8)
    asked = capture.Asked(torch.nn.Module(), query, query, query, mask, None, None, {})
    asked.module.layer_idx = 0
    call, seen = asked.call(), capture.visible_keys(mask)
    if refused:
        with pytest.raises(ReplayError, match="a mask with biases, or one for each head"):
            capture.check_plain_causal(asked, call, seen)
    else:
        capture.check_plain_causal(asked, call, seen)


def test_layers_without_keys_have_no_candidates_to_count():
    """Of state-space layers; a NaN would be no JSON."""
    counts = Counts(layer_rows=torch.tensor([0, 40]), layer_candidates=torch.tensor([0, 10]))
    assert counts.candidates_by_layer == [1.0, 0.25]
