"""The threshold table: strict loading, stable dumping, θ between and beyond lengths."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from table_factory import make_identity, make_key_statistics, make_table

from topt_vllm.attention.common import Thetas
from topt_vllm.output import not_writable
from topt_vllm.table.file import dump, dumps, load
from topt_vllm.table.schema import ThresholdTableError


@pytest.fixture
def content() -> dict[str, Any]:
    """A valid table as plain data, to be broken."""
    return make_table().model_dump()


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def set_at(*keys: str | int, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def delete_at(*keys: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


LAYER = ("budgets", 1, "layers", 1)

BROKEN = {
    "wrong version": (set_at("schema_version", value=2), "schema_version is 2, this release reads 1"),
    "no version": (delete_at("schema_version"), "schema_version is None"),
    "unknown key": (set_at("extra", value=1), "extra: unknown key"),
    "unknown key, nested": (set_at(*LAYER, "beta", value=[]), "budgets[1].layers[1].beta: unknown key"),
    "missing key": (delete_at("lengths"), "lengths: missing key"),
    "missing key, nested": (delete_at("budgets", 0, "dense_layers"), "budgets[0].dense_layers: missing key"),
    "wrong type": (set_at("budgets", 0, "k", value="many"), "budgets[0].k: "),
    "number as text": (set_at(*LAYER, "theta", 0, 0, value="-1.5"), "budgets[1].layers[1].theta[0][0]: "),
    "k of zero": (set_at("budgets", 0, "k", value=0), "budgets[0].k: "),
    "wrong fingerprint form": (set_at("model", "fingerprint", value="md5:0"), "model.fingerprint: "),
    "too few heads": (
        set_at(*LAYER, "theta", value=[[0.0, 0.0, 0.0]]),
        "budgets[1].layers[1].theta: 4 query heads expected, got 1",
    ),
    "too few heads in the law": (
        set_at(*LAYER, "law", value=[[0.0, 0.0] for _ in range(5)]),
        "budgets[1].layers[1].law: 4 query heads expected, got 5",
    ),
    "too few lengths": (
        set_at(*LAYER, "theta", 2, value=[0.0, 0.0]),
        "budgets[1].layers[1].theta[2]: 3 numbers expected, got 2",
    ),
    "a layer missing": (
        delete_at(*LAYER),
        "budgets[1].layers: layers [0, 2] expected in this order, got [0]",
    ),
    "a layer too many": (
        set_at(*LAYER, "layer", value=1),
        "budgets[1].layers: layers [0, 2] expected in this order, got [0, 1]",
    ),
    "NaN": (
        set_at(*LAYER, "theta", 3, 1, value=math.nan),
        "budgets[1].layers[1].theta[3]: must be finite",
    ),
    "infinite law": (
        set_at(*LAYER, "law", 0, value=[-math.inf, 0.0]),
        "budgets[1].layers[1].law[0]: must be finite",
    ),
    "lengths not ascending": (
        set_at("lengths", value=[256, 1024, 512]),
        "lengths: must be positive and strictly ascending, got [256, 1024, 512]",
    ),
    "a length twice": (set_at("lengths", value=[256, 256, 512]), "lengths: must be"),
    "no lengths": (set_at("lengths", value=[]), "lengths: "),
    "no budgets": (set_at("budgets", value=[]), "budgets: "),
    "budgets not ascending": (set_at("budgets", 1, "k", value=64), "budgets: k must be strictly ascending"),
    "neither k nor name": (
        set_at("budgets", 1, "k", value=None),
        "budgets[1]: either k or name is needed, got k None and name None",
    ),
    "k and name": (
        set_at("budgets", 1, "name", value="loss-1%"),
        "budgets[1]: either k or name is needed, got k 128 and name 'loss-1%'",
    ),
    "a name before a k": (
        lambda content: content["budgets"][0].update(k=None, name="loss-1%"),
        "budgets: those with a k come first, got ['loss-1%', 128]",
    ),
    "a length beyond int32": (set_at("lengths", 2, value=2**31), "lengths: must be at most 2147483647"),
    "θ beyond float32": (
        set_at(*LAYER, "theta", 0, 0, value=1e39),
        "budgets[1].layers[1].theta[0]: must be finite",
    ),
    "quality that isn't finite": (
        set_at("budgets", 0, "quality", "kept_over_k", "p5", value=math.nan),
        "budgets[0].quality.kept_over_k.p5: Input should be a finite number, got nan",
    ),
    "rows of fewer layers": (
        set_at("budgets", 0, "quality", "layer_rows_read", value=[0.5]),
        "budgets[0].quality.layer_rows_read: 3 layers expected, got [0.5]",
    ),
    "a share above 1": (
        set_at("budgets", 0, "quality", "v_rows_read", value=7.5),
        "budgets[0].quality.v_rows_read: Input should be less than or equal to 1, got 7.5",
    ),
    "window of a layer that isn't": (
        set_at("model", "sliding_window_layers", value=[1, 3]),
        "model.sliding_window_layers: must be ascending and among 3 layers, got [1, 3]",
    ),
    "windows in all layers": (
        set_at("model", "sliding_window_layers", value=[0, 1, 2]),
        "model: one of 3 layers must have full attention",
    ),
    "window of a layer without attention": (
        set_at("model", "attention_free_layers", value=[1]),
        "model.attention_free_layers: layers [1] have a sliding window, so they attend",
    ),
    "thresholds of a layer without attention": (
        set_at("model", "attention_free_layers", value=[2]),
        "budgets[0].layers: layers [0] expected in this order, got [0, 2]",
    ),
    "dense layer twice": (
        set_at("budgets", 0, "dense_layers", value=[0, 0]),
        "budgets[0].dense_layers: layers must differ, got [0, 0]",
    ),
    "name over two lines": (
        lambda content: content["budgets"][1].update(k=None, name="a\nb"),
        "budgets[1].name: up to 80 printable characters expected",
    ),
    "a number for a name": (
        lambda content: content["budgets"][1].update(k=None, name="64"),
        "budgets[1].name: a number is no name, got '64'",
    ),
    "dense layer that has a window": (
        set_at("budgets", 0, "dense_layers", value=[1]),
        "budgets[0].dense_layers: layers [1] are not among the full-attention layers",
    ),
}


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-50, 1e-40])
def test_scales_have_an_inverse_in_float32(tmp_path, scale):
    """K is divided by them; an answer would be NaN."""
    table = make_table()
    content = table.model_copy(update={"key_statistics": make_key_statistics(table.model)}).model_dump()
    content["key_statistics"]["layers"][1]["scale"][0][3] = scale
    with pytest.raises(
        ThresholdTableError, match=r"layers\[1\].scale: must be finite and above 0 in float32"
    ):
        load(write(tmp_path / "broken.yaml", content))
    content["key_statistics"]["layers"][1]["scale"][0][3] = 1e-37
    transform = load(write(tmp_path / "small.yaml", content)).key_statistics.transforms()[2]
    assert (1.0 / transform.scale).isfinite().all()


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_table_is_refused(tmp_path, content, change, message):
    change(content)
    path = write(tmp_path / "broken.yaml", content)
    with pytest.raises(ThresholdTableError) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{path}: {message}")


def test_files_that_hold_no_table(tmp_path):
    with pytest.raises(ThresholdTableError, match=r"absent.yaml: can't be read"):
        load(tmp_path / "absent.yaml")
    for name, text, message in (
        ("list.yaml", "- 1", "a mapping was expected, got list"),
        ("empty.yaml", "", "a mapping was expected, got NoneType"),
        ("torn.yaml", "a: [1, ", "not valid YAML"),
        ("object.yaml", "a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ThresholdTableError, match=rf"{name}: {message}"):
            load(tmp_path / name)


def test_table_of_another_model_differs():
    served = make_identity()
    assert served.difference(make_identity(id="renamed", revision="abc")) is None
    assert served.difference(make_identity(num_query_heads=8)) == "num_query_heads: 4 against 8"
    other = make_identity(fingerprint="sha256:" + "1" * 64)
    assert served.difference(other) == f"fingerprint: {served.fingerprint} against {other.fingerprint}"


def test_dump_of_load_is_byte_identical(tmp_path):
    table = make_table()
    dump(table, tmp_path / "a.yaml")
    dump(load(tmp_path / "a.yaml"), tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()
    assert load(tmp_path / "a.yaml") == table


number = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))


@settings(max_examples=30, deadline=None)
@given(st.lists(number, min_size=3, max_size=3), st.text(max_size=20))
def test_any_number_and_name_survives(tmp_path_factory, theta, name):
    """Numbers such as 1e-05 and names such as "no" or "a: b" are where YAML writers and readers disagree."""
    content = make_table(make_identity(id=name)).model_dump()
    content["budgets"][0]["layers"][0]["theta"][0] = theta
    table = type(make_table()).model_validate(content)
    path = tmp_path_factory.mktemp("table") / "t.yaml"
    dump(table, path)
    assert load(path) == table
    assert dumps(load(path)) == path.read_text(encoding="utf-8")


def test_existing_table_stays_without_force(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--force"):
        dump(make_table(), path)
    assert path.read_text(encoding="utf-8") == "mine"
    dump(make_table(), path, force=True)
    assert load(path) == make_table()


def test_a_link_is_replaced_and_its_own_folder_has_to_be_writable(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (there / "t.yaml").write_text("mine", encoding="utf-8")
    for target in (there / "t.yaml", "/nowhere/t.yaml"):
        path = here / "t.yaml"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        assert not_writable(path) is None
        dump(make_table(), path, force=True)
        assert not path.is_symlink()
        assert load(path) == make_table()
    assert (there / "t.yaml").read_text(encoding="utf-8") == "mine"
    path.unlink()
    path.symlink_to(there / "t.yaml")
    monkeypatch.setattr("os.access", lambda folder, _: folder != here)
    assert not_writable(path) == f"the folder {here} can't be written to"


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t.yaml"
    path.write_text("old", encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        dump(make_table(), path, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.yaml"]
    assert path.read_text(encoding="utf-8") == "old"


def test_table_that_could_not_be_loaded_is_not_written(tmp_path):
    with pytest.raises(ThresholdTableError, match="ascending"):
        dump(make_table(lengths=[512, 256]), tmp_path / "t.yaml")
    assert list(tmp_path.iterdir()) == []


def test_budget_by_k():
    table = make_table()
    assert table.budget(64).k == 64
    assert table.budget(None).k == 128
    with pytest.raises(ThresholdTableError, match="budget is 100, but the table has budgets 64, 128"):
        table.budget(100)


def test_table_written_before_there_were_names_stays_byte_identical(tmp_path):
    """Keys that were added later are left out where they weren't given, so old tables load and stay as they are."""
    shipped = Path(__file__).parent.parent / "configs" / "SmolLM2-135M-Instruct.yaml"
    assert dumps(load(shipped)) == shipped.read_text(encoding="utf-8")


def test_keys_of_named_budgets():
    table = make_table()
    entries = [
        entry.model_copy(update={"k": [32, 8, 8, 16]}) if entry.layer else entry
        for entry in table.budgets[0].layers
    ]
    named = table.budgets[0].model_copy(update={"k": None, "name": "rows-5%", "layers": entries})
    assert named.key == "rows-5%"
    assert named.ks() == {2: [32, 8, 8, 16]}
    assert table.budgets[0].ks() == {2: [64] * 4}


def test_thetas_leave_dense_layers_out():
    table = make_table()
    thetas = table.budget(64).thetas(table.lengths)
    assert list(thetas) == [2]
    assert thetas[2].at(256).tolist() == pytest.approx([-2.064, -2.164, -2.264, -2.364])


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8, unique=True).map(sorted), st.data())
def test_theta_between_lengths_is_linear_in_log_length(lengths, data):
    theta = torch.linspace(-3, 3, 2 * len(lengths)).view(2, -1)
    thetas = Thetas(torch.tensor(lengths, dtype=torch.int32), theta, torch.tensor([[1.0, -0.5], [0.0, 0.25]]))
    n = data.draw(st.integers(1, 2 * lengths[-1]))
    if n < lengths[0]:
        expected = [-math.inf, -math.inf]
    elif n > lengths[-1]:
        expected = [1.0 - 0.5 * math.log(n), 0.25 * math.log(n)]
    else:
        expected = [np.interp(math.log2(n), np.log2(lengths), row.numpy()) for row in theta]
    assert thetas.at(n).tolist() == pytest.approx(expected, abs=1e-4)


def test_heads_of_a_rank():
    table = make_table()
    thetas = table.budget(64).thetas(table.lengths)[2]
    assert torch.equal(thetas.heads(2, 2).at(512), thetas.at(512)[2:])


@pytest.mark.slow
def test_table_of_a_70b_model_loads_in_seconds(tmp_path):
    identity = make_identity(
        num_layers=80, num_query_heads=64, num_kv_heads=8, head_dim=128, sliding_window_layers=[]
    )
    lengths = [256 << i for i in range(12)]
    dump(make_table(identity, (64, 128, 256, 512), lengths), tmp_path / "big.yaml")
    # CPU time: the machine may be doing other things.
    start = time.process_time()
    table = load(tmp_path / "big.yaml")
    seconds = time.process_time() - start
    print(f"80 layers × 64 heads × 12 lengths × 4 budgets loaded in {seconds:.1f} s of CPU time")
    assert len(table.budgets[3].layers) == 80
    assert seconds < 20
