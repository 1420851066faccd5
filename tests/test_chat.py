"""The demo's chat: which turns a conversation keeps."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a server that answers "yes" and has no counters."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    module = importlib.import_module("chat")
    models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="tiny")]))
    monkeypatch.setattr(module, "OpenAI", lambda **_: SimpleNamespace(models=models))
    monkeypatch.setattr(module, "counters", lambda url: None)
    monkeypatch.setattr(module, "share_read", lambda url, before: None)
    monkeypatch.setattr(module, "ask", lambda *_: module.Answer("yes", 10, 1, 0.1, 0.2))
    return module


def roles(conversation: Any) -> list[str]:
    return [message["role"] for message in conversation._messages][len(conversation._start) :]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone"), openai.OpenAIError("refused")])
def test_a_turn_without_an_answer_is_taken_back(
    chat: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    conversation = chat.Chat("http://server", "", 8)
    conversation.say("Is it?")
    monkeypatch.setattr(chat, "ask", lambda *_: (_ for _ in ()).throw(error))
    conversation.say("And now?")
    assert roles(conversation) == ["user", "assistant"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone"), ValueError("<html>")])
def test_an_answer_stays_whose_cost_is_not_told(
    chat: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    conversation = chat.Chat("http://server", "", 8)
    monkeypatch.setattr(chat, "share_read", lambda *_: (_ for _ in ()).throw(error))
    conversation.say("Is it?")
    assert roles(conversation) == ["user", "assistant"]


@pytest.mark.parametrize("models", [SimpleNamespace(data=[]), "<html>"])
def test_what_is_no_vllm_is_refused(
    chat: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: Any
):
    server = SimpleNamespace(models=SimpleNamespace(list=lambda: models))
    monkeypatch.setattr(chat, "OpenAI", lambda **_: server)
    assert chat.main([]) == 1
    assert "its /v1/models lists no model" in capsys.readouterr().err


def test_a_question_is_not_asked_whose_result_cannot_be_written(
    chat: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ask = importlib.import_module("ask")
    assert ask.main(["--text", __file__, "--result", str(tmp_path / "none" / "x.json")]) == 1
    assert "can't be written" in capsys.readouterr().err
