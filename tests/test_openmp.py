"""OpenMP's threads: what processes that start later are told."""

import os

import pytest

from topt_vllm import openmp

TURNS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, "10000"), ({TURNS: "300000"}, "300000"), ({POLICY: "passive"}, None), ({POLICY: "active"}, None)],
)
def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], turns: str | None):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    openmp.wait_briefly()
    assert environment.get(TURNS) == turns
