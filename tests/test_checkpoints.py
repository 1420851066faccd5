"""Models' folders as people have them: refused before anything is read for long, and nothing is left behind."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from tiny_models import SMALL, save_model, save_text
from transformers import LlamaConfig

from topt_vllm.cli.main import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 269060552\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    save_model(path / "model", LlamaConfig(**SMALL))
    save_text(path / "text.txt", 4000)
    return path


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(whole / "model", tmp_path / "model")
    return tmp_path / "model"


def commands(whole: Path, model: Path, output: Path) -> list[list[str]]:
    """Every command that reads a checkpoint by itself."""
    given = f"--model {model} --dataset {whole / 'text.txt'}"
    return [
        shlex.split(f"calibrate {given} --num-samples 2 --max-seq-length 512 --k 16 --output {output}"),
        shlex.split(f"bench capture {given} --seq-len 512 --output {output}"),
    ]


def refusals(whole: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each command says; it must be one line, and leave nothing."""
    found = []
    output = model.parent / "out"
    for arguments in commands(whole, model, output):
        before = sorted(model.parent.rglob("*"))
        capsys.readouterr()
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        # A bar of the weights' progress may stand before it.
        said = captured.err.rpartition("\r")[2].partition("it/s]\n")
        message = said[2] or said[0]
        assert message.count("\n") == 1, captured.err
        assert sorted(model.parent.rglob("*")) == before
        found.append(message.removeprefix("topt-vllm: error: "))
    return found


def lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text(POINTER.format(0))


def no_folder(model: Path) -> None:
    shutil.rmtree(model)


def lfs_pointer_of_the_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text(POINTER.format(0))


def cut_off(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


def cut_off_in_the_header(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:100])


def empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def missing_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def broken_index(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text("[]")


def lacking_a_layer(model: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    kept = {name: tensor for name, tensor in loaded.state_dict().items() if "layers.1.mlp.up" not in name}
    loaded.save_pretrained(model, state_dict=kept)


def weights_of_another_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def no_configuration(model: Path) -> None:
    (model / "config.json").unlink()


def gguf_in_a_folder(model: Path) -> None:
    no_configuration(model)
    (model / "q4.gguf").write_bytes(b"GGUF" + bytes(100))


def gguf_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_bytes(b"GGUF" + bytes(100))


BROKEN = {
    no_folder: "no such folder; a folder in Hugging Face's format",
    lfs_pointer: "model.safetensors: a Git LFS pointer, not the file itself; run `git lfs pull` in the folder",
    lfs_pointer_of_the_tokenizer: "tokenizer.json: a Git LFS pointer",
    cut_off: "); download it again",
    cut_off_in_the_header: "model.safetensors has 100 bytes: it was cut off, or is no safetensors file",
    empty_weights: "model.safetensors has 0 bytes: it was cut off, or is no safetensors file",
    no_weights: "the folder has no weights: no model.safetensors, model.safetensors.index.json or",
    missing_shard: "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names",
    broken_index: "model.safetensors.index.json is not an index of weights",
    lacking_a_layer: "the weights lack model.layers.1.mlp.up_proj.weight",
    weights_of_another_shape: "proj.weight has the shape [32, 32], and config.json says [32, 48]",
    no_tokenizer: "no tokenizer: the folder has none of tokenizer.json, tokenizer.model, vocab.json",
    broken_tokenizer: "--model ",
    no_configuration: "it has no config.json; a folder in Hugging Face's format",
    gguf_in_a_folder: "it has q4.gguf, a GGUF file, which can't be calibrated: name the checkpoint",
    gguf_file: "a GGUF file, which can't be calibrated: name the checkpoint that it was made from; a folder in",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_what_is_no_whole_checkpoint_is_refused_in_one_line(whole, model, capsys, breaks):
    breaks(model)
    for message in refusals(whole, model, capsys):
        assert message.startswith(f"--model {model}: ")
        assert BROKEN[breaks] in message
