"""The calibrator: scores as the operator sees them, thresholds from known scores, and whole runs on tiny models."""

import dataclasses
import math
import time
from pathlib import Path
from statistics import NormalDist
from typing import ClassVar

import pytest
import torch
import transformers
from tiny_models import KINDS, SMALL, byte_tokenizer, save_model, save_text
from transformers import LlamaConfig

from topt_vllm.attention.common import Selection, Stat, Thetas, new_statistics
from topt_vllm.attention.reference import attend_row, scaled_scores
from topt_vllm.calibration.calibrate import _today, calibrate, prepare
from topt_vllm.calibration.law import held_out_error
from topt_vllm.calibration.options import CalibrationError, CalibrationOptions, calibrated_lengths
from topt_vllm.calibration.quality import quality
from topt_vllm.calibration.statistics import KthScoreMoments, RowSample, deviations, kth_scores, sample_rows
from topt_vllm.replay import capture
from topt_vllm.replay import scores as scores_module
from topt_vllm.replay.attention import RuleAttention
from topt_vllm.replay.dense_pass import DensePass
from topt_vllm.replay.model import Subject
from topt_vllm.replay.options import ReplayError
from topt_vllm.replay.predictions import Losses
from topt_vllm.replay.rule import Rows, Rule, attend
from topt_vllm.replay.scores import LayerCall
from topt_vllm.replay.texts import cut_sequences
from topt_vllm.replay.top_theta import TopTheta
from topt_vllm.table.file import dumps
from topt_vllm.table.identity import identify
from topt_vllm.table.schema import Budget, LayerThresholds, ThresholdTable

TEXT = 2700


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test crosses their edges."""
    monkeypatch.setattr(scores_module, "_CHUNK_ELEMENTS", 1000)


def random_call(n: int = 70, softcap: float = 0.0) -> LayerCall:
    torch.manual_seed(1)
    return LayerCall(
        layer=5,
        query=torch.randn(4, n, 8),
        key=torch.randn(2, n, 8),
        value=torch.randn(2, n, 8),
        scale=0.7,
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_scores_are_the_operators(softcap):
    call = random_call(softcap=softcap)
    scores = call.scores(torch.tensor([0, 3, 41]))
    for i, row in enumerate((0, 3, 41)):
        expected = scaled_scores(call.query[:, row], call.key[:, : row + 1], 0.7, softcap)
        torch.testing.assert_close(scores[:, i, : row + 1], expected)
        assert torch.isneginf(scores[:, i, row + 1 :]).all()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.usefixtures("small_chunks")
def test_attention_in_chunks_is_the_operators(softcap):
    call = random_call(softcap=softcap)
    out = attend(call, None)
    for row in (0, 1, 13, 69):
        expected = attend_row(
            call.query[:, row],
            call.key[:, : row + 1],
            call.value[:, : row + 1],
            None,
            Selection(),
            0.7,
            softcap,
        )
        torch.testing.assert_close(out[:, row], expected)


@dataclasses.dataclass(frozen=True)
class TopKeys(Rule):
    """Each query head uses its ``k`` best keys, and the mean of V for the others."""

    k: int

    compensate: ClassVar[bool] = True

    def keep(self, rows: Rows) -> torch.Tensor:
        least = rows.scores.topk(min(self.k, rows.scores.shape[-1]), dim=-1).values[..., -1:]
        return (rows.scores >= least) & (rows.scores > -torch.inf)


@pytest.mark.usefixtures("small_chunks")
def test_top_k_attention_is_the_operators_with_theta_at_the_kth_score():
    call = random_call()
    out = attend(call, TopKeys(6))
    for row in (2, 5, 6, 33, 69):
        key, value = call.key[:, : row + 1], call.value[:, : row + 1]
        scores = scaled_scores(call.query[:, row], key, 0.7)
        theta = scores.topk(min(6, row + 1), dim=-1).values[:, -1]
        # One recent token is kept even below θ; it has to be among the top ones for the two to agree.
        heads = scores[:, -1] >= theta
        expected = attend_row(call.query[:, row], key, value, theta, Selection(group_keep="head"), 0.7)
        torch.testing.assert_close(out[heads, row], expected[heads])


def known_scores(n: int, factor: float) -> LayerCall:
    """Key j of head h scores factor·(h+1)·rank(j), ranks being a permutation: the k-th largest is plain."""
    torch.manual_seed(0)
    return LayerCall(
        layer=2,
        query=torch.tensor([1.0, 2.0])[:, None, None].expand(2, n, 1),
        key=torch.randperm(n)[None, :, None].float(),
        value=torch.zeros(1, n, 1),
        scale=factor,
    )


@pytest.mark.usefixtures("small_chunks")
def test_known_scores_give_known_kth_scores():
    call = known_scores(300, 0.5)
    # The last row sees all ranks 0..299: its k-th largest is 300 − k.
    values = kth_scores(call, torch.tensor([99, 299]), (1, 4, 64))
    assert values[:, 0, 1].tolist() == [149.5, 148.0, 118.0]
    assert values[:, 1, 1].tolist() == [299.0, 296.0, 236.0]
    seen = call.key[0, :100, 0].sort(descending=True).values
    # Of 100 keys a budget asks for no more than 50.
    assert values[:, 0, 0].tolist() == [0.5 * seen[k - 1] for k in (1, 4, 50)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_score_that_is_no_number_names_layer_and_head(value):
    call = known_scores(100, 1.0)
    query = call.query.clone()
    query[1, 70] = value
    broken = LayerCall(call.layer, query, call.key + 1, call.value, 1.0)
    with pytest.raises(CalibrationError, match=rf"layer 2, query head 1: a score is {value}"):
        kth_scores(broken, torch.tensor([50, 70]), (4,))


@pytest.mark.parametrize(
    ("longest", "k", "lengths"),
    [
        (2048, 64, [256, 512, 1024, 2048]),
        (8192, 256, [512, 1024, 2048, 4096, 8192]),
        (1000, 128, [256, 512, 1000]),
        (300, 100, [256, 300]),
        (257, 1, [256, 257]),
        (1025, 257, [1024, 1025]),
    ],
)
def test_calibrated_lengths(longest, k, lengths):
    assert calibrated_lengths(longest, k) == lengths


@pytest.mark.parametrize(("longest", "k", "first"), [(256, 1, 256), (512, 256, 512), (1000, 257, 1024)])
def test_sequences_go_beyond_the_first_length(longest, k, first):
    """Of a held-back text as long as that, every row would be dense and nothing measured."""
    with pytest.raises(CalibrationError, match=f"--k {k} needs sequences of more than {first} tokens"):
        calibrated_lengths(longest, k)


def test_the_shortest_sequences_have_a_row_to_measure(folders):
    (budget,) = run(folders["llama"], max_seq_length=257, ks=(16,), num_samples=1).budgets
    assert budget.quality.rows == 1
    assert budget.quality.v_rows_read < 1.0
    assert budget.quality.layer_candidates[0] == 1.0 > max(budget.quality.layer_candidates[1:])


def test_sampled_rows_lie_around_their_lengths():
    sample = sample_rows([256, 512, 600], torch.Generator().manual_seed(3))
    again = sample_rows([256, 512, 600], torch.Generator().manual_seed(3))
    assert torch.equal(sample.rows, again.rows)
    contexts = sample.rows + 1
    assert bool((contexts.diff() >= 0).all())
    assert int(contexts.max()) <= 600
    for index, length in enumerate((256, 512, 600)):
        mine = contexts[sample.length_of == index]
        assert len(set(mine.tolist())) == 64
        assert int(mine.min()) > length / math.sqrt(2)
        assert int(mine.max()) <= length * math.sqrt(2)


@pytest.mark.parametrize("k", [16, 100, 256, 400])
def test_fit_recovers_the_thresholds_of_normal_scores(k):
    """Rows of the longest length lie below it only, and those of n < 2k have their middle score."""
    lengths = [256, 512, 1024]
    moments = KthScoreMoments((8, k), 2, lengths)
    for seed in range(3):
        sample = sample_rows(lengths, torch.Generator().manual_seed(seed))
        z = deviations(torch.tensor([[8], [k]]), sample.rows + 1)
        moments.add(sample, torch.stack([3.0 + 0.5 * z, 1.0 - 2.0 * z], dim=1))
    for budget, keys in enumerate([8, k]):
        law, theta = moments.fit(budget).rounded()
        for head, (a, b) in enumerate([(3.0, 0.5), (1.0, -2.0)]):

            def expected(length: int, a: float = a, b: float = b, keys: int = keys) -> float:
                return a + b * NormalDist().inv_cdf(1 - min(keys, length // 2) / length)

            assert theta[head] == pytest.approx([expected(length) for length in lengths], abs=1e-4)
            c0, c1 = law[head]
            for length in (1024, 4096):
                assert c0 + c1 * math.log(length) == pytest.approx(expected(length), abs=1e-3)


def test_the_law_is_that_of_the_longest_lengths():
    """What scores do at short contexts says little of long ones."""
    lengths = [256, 512, 1024, 2048]
    moments = KthScoreMoments((16,), 1, lengths)
    sample = sample_rows(lengths, torch.Generator().manual_seed(0))
    z = deviations(torch.tensor([16]), sample.rows + 1)
    values = torch.where(sample.length_of < 2, 9.0 - 3.0 * z, 1.0 + 0.5 * z)
    moments.add(sample, values[None, None])
    (law,), _ = moments.fit(0).rounded()
    assert law[0] + law[1] * math.log(8192) == pytest.approx(
        1 + 0.5 * NormalDist().inv_cdf(1 - 16 / 8192), abs=1e-3
    )


def test_where_no_row_has_2k_keys_the_law_is_flat():
    moments = KthScoreMoments((512,), 1, [256, 512])
    sample = sample_rows([256, 512], torch.Generator().manual_seed(0))
    middle = 2.5 + 0.1 * torch.randn(len(sample.rows), generator=torch.Generator().manual_seed(1)).double()
    moments.add(sample, middle[None, None])
    law, theta = moments.fit(0).rounded()
    means = [middle[sample.length_of == index].mean().item() for index in range(2)]
    assert theta[0] == pytest.approx(means, abs=1e-4)
    assert law == [[theta[0][1], 0.0]]


def test_law_error_is_what_the_longest_length_misses_by():
    """Head 0 follows a law; head 1 too, but for 0.5 at the longest length. Dense layers don't count."""
    lengths = [256, 512, 1024, 2048]
    follows = [2.0 - 0.3 * NormalDist().inv_cdf(1 - 16 / n) for n in lengths]
    misses = [*follows[:-1], follows[-1] + 0.5]
    layers = [
        LayerThresholds(layer=0, law=[[0.0, 0.0]] * 2, theta=[[9.0, 1.0, 5.0, 7.0]] * 2),
        LayerThresholds(layer=1, law=[[0.0, 0.0]] * 2, theta=[follows, misses]),
    ]
    budget = Budget(k=16, dense_layers=[0], quality=None, layers=layers)
    assert held_out_error(budget, lengths) == pytest.approx((0.5 / math.sqrt(2), 0.5))
    two = [entry.model_copy(update={"theta": [row[:2] for row in entry.theta]}) for entry in layers]
    assert held_out_error(budget.model_copy(update={"layers": two}), lengths[:2]) is None


def test_one_row_gives_its_own_score():
    moments = KthScoreMoments((16,), 1, [256])
    moments.add(RowSample(torch.tensor([255]), torch.tensor([0])), torch.tensor([[[1.25]]]))
    law, theta = moments.fit(0).rounded()
    assert (law, theta) == ([[1.25, 0.0]], [[1.25]])


@pytest.mark.usefixtures("small_chunks")
def test_quality_is_what_the_operator_counts():
    identity = identify(LlamaConfig(**SMALL), "tiny")
    call = random_call()
    rows = torch.tensor([30, 45, 69])
    thetas = Thetas(torch.tensor([16, 70]), torch.tensor([[1.0, 2.0]] * 4), torch.zeros(4, 2))
    rules = {2: TopTheta({2: thetas})}
    read = RuleAttention(Subject(identity, 0, 257), rules, rows + 1, {2: [10] * 4})
    for row in rows.tolist():
        seen = {"query": call.query[:, row : row + 1], "key": call.key[:, : row + 1], "first": row}
        read.attend(dataclasses.replace(call, layer=2, value=call.value[:, : row + 1], **seen))
    result = quality(read, 70, 3, Losses(0.0, 0.0, 1.0))

    (statistics,) = new_statistics()
    for row in rows.tolist():
        n = row + 1
        attend_row(
            call.query[:, row],
            call.key[:, :n],
            call.value[:, :n],
            thetas.at(n),
            Selection(),
            0.7,
            statistics=statistics,
        )
    contexts, layers = 31 + 46 + 70, identity.num_layers
    expected = statistics[Stat.V_ROWS_READ].item() + (layers - 1) * 2 * contexts
    assert result.v_rows_read == pytest.approx(expected / (layers * 2 * contexts), abs=1e-4)
    assert result.dropped_mass == pytest.approx(statistics[Stat.DROPPED_MASS].item() / 12, abs=1e-4)
    assert result.kept_over_k.p5 <= result.kept_over_k.p50 <= result.kept_over_k.p95
    with pytest.raises(CalibrationError, match=r"quality\.kl: Input should be a finite number, got nan"):
        quality(read, 70, 3, Losses(0.0, math.nan, 1.0))


def test_windowed_layers_count_their_window():
    identity = identify(KINDS["gemma3, windows"], "tiny")
    rows = torch.tensor([19, 99])
    thetas = Thetas(torch.tensor([1]), torch.zeros(4, 1), torch.zeros(4, 2))
    read = RuleAttention(Subject(identity, 32, 257), {1: TopTheta({1: thetas})}, rows + 1, {1: [4] * 4})
    for row in rows.tolist():
        # Every score is −1.
        key = torch.full((2, row + 1, 1), -1.0)
        read.attend(LayerCall(1, torch.ones(4, 1, 1), key, key, 1.0, first=row))
    # Two windowed layers read 20 and 32 rows; the full one keeps only the recent token of 20 and 100.
    assert read.counts.shares()["v_rows_read"] == pytest.approx((2 * 52 + 2) / (2 * 52 + 120), abs=1e-4)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_capture_leaves_the_model_as_it_is(tmp_path, config, monkeypatch):
    """Hidden states under capture are those of the eager model, softcap and windows included."""
    monkeypatch.setattr(capture, "_MASKED_ROWS", 20)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        save_model(tmp_path, config), attn_implementation="eager", dtype=torch.float32
    )
    tokens = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
    identity = identify(model.config, "tiny")
    seen: list[LayerCall] = []
    with torch.inference_mode():
        expected = model.base_model(tokens, use_cache=False).last_hidden_state
    found = DensePass(
        model,
        Subject(identity, getattr(model.config, "sliding_window", 0) or 0, 257),
        tokens[0].tolist(),
        (range(90),),
        seen.append,
    ).hidden(range(90))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [call.layer for call in seen] == [i for i in range(3) if i not in identity.sliding_window_layers]
    assert model.config._attn_implementation == "eager"


def test_sequences_do_not_overlap_and_the_last_part_is_held_back():
    tokenizer = byte_tokenizer()
    documents = ["a" * 40, "b" * 37, "c" * 53]
    stream = tokenizer("".join(documents))["input_ids"]
    found = cut_sequences(tokenizer, documents, 3, 30)
    assert found.held_back == stream[-30:]
    assert found.calibration == [stream[0:30], stream[35:65], stream[70:100]]


def test_a_short_text_is_enough_where_nothing_has_to_be_held_back():
    """And the sequences of a longer one stay where they are."""
    tokenizer, text = byte_tokenizer(), "abcdefghij" * 9
    assert cut_sequences(tokenizer, [text], 2, 30, hold_back=False) == cut_sequences(tokenizer, [text], 2, 30)
    found = cut_sequences(tokenizer, [text[:70]], 2, 30, hold_back=False)
    stream = tokenizer(text[:70])["input_ids"]
    assert (found.calibration, found.held_back) == ([stream[:30], stream[40:]], [])
    with pytest.raises(ReplayError, match=r"sequences of 30 tokens need 90: 3\. Add text"):
        cut_sequences(tokenizer, [text[:70]], 3, 30, hold_back=False)


def test_sequences_start_as_the_tokenizer_starts_a_text():
    tokenizer = byte_tokenizer(add_bos=True)
    assert tokenizer("a")["input_ids"][0] == 256
    found = cut_sequences(tokenizer, ["abcdefghij"], 1, 6)
    assert all(
        len(sequence) == 6 and sequence[0] == 256 for sequence in (*found.calibration, found.held_back)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One tiny model of each kind, each with a text."""
    made = {}
    for name, config in KINDS.items():
        made[name] = save_model(tmp_path_factory.mktemp("model"), config)
        save_text(made[name] / "text.txt", TEXT)
    return made


def run(folder: Path, **changes: object) -> ThresholdTable:
    options = {"num_samples": 3, "max_seq_length": 600, "ks": (16, 32), "device": "cpu"} | changes
    return calibrate(
        prepare(
            CalibrationOptions(
                str(folder), (str(folder / "text.txt"),), output=folder / "out.yaml", **options
            )
        )
    )


def test_same_seed_gives_the_same_bytes(folders, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first, second = (dumps(run(folders["llama"], seed=7)) for _ in range(2))
    assert first == second
    assert "date: '1970-01-02'" in first
    assert dumps(run(folders["llama"], seed=8)) != first


@pytest.mark.parametrize("epoch", ["yesterday", "1e9", "9" * 30])
def test_a_date_that_is_none_is_refused_before_the_weights(folders, monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    monkeypatch.setattr("topt_vllm.calibration.calibrate.load_causal_lm", None)
    with pytest.raises(CalibrationError, match=f"SOURCE_DATE_EPOCH is '{epoch}'; seconds since 1970"):
        run(folders["llama"])


def test_an_empty_date_is_today(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    assert _today() == "1970-01-02"


def test_thresholds_keep_about_k_keys(folders):
    table = run(folders["llama"])
    assert table.lengths == [256, 512, 600]
    for budget in table.budgets:
        assert budget.dense_layers == [0]
        assert [entry.layer for entry in budget.layers] == [0, 1, 2]
        assert budget.quality is not None
        assert 0.7 < budget.quality.kept_over_k.p50 < 1.3
        assert budget.quality.v_rows_read < 0.7
    few, many = (budget.quality for budget in table.budgets)
    assert few.v_rows_read < many.v_rows_read
    assert few.dropped_mass > many.dropped_mass


@pytest.mark.parametrize("name", ["gemma2, softcap", "gemma3, windows"])
def test_windowed_layers_carry_no_thresholds(folders, name):
    table = run(folders[name])
    assert table.model.sliding_window_layers == [0, 2]
    assert [entry.layer for entry in table.budgets[0].layers] == [1]
    assert table.budgets[0].dense_layers == []
    if name.startswith("gemma2"):
        assert all(abs(theta) <= 2.0 for row in table.budgets[0].layers[0].theta for theta in row)


def test_broken_weights_are_reported(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[10] = math.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    save_text(tmp_path / "text.txt", TEXT)
    with pytest.raises(CalibrationError, match="layer 1, query head 1: a score is nan"):
        run(tmp_path)
