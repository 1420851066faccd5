"""The README names every setting, and its examples are real."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from model_families import FAMILIES, REFUSED

from topt_vllm import envs
from topt_vllm.config import TopThetaConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_rows(*heads: str) -> dict[str, str]:
    """First column without backticks → the rest, of the table whose header has these columns."""
    header = "| " + " | ".join(heads) + " |"
    body = README.partition(header)[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", body, re.MULTILINE))


def test_every_configuration_key_is_listed():
    assert list(table_rows("key", "type", "default", "effect")) == [f.name for f in fields(TopThetaConfig)]


def test_every_default_is_the_code_s():
    rows = table_rows("key", "type", "default", "effect")
    for field in fields(TopThetaConfig):
        shown = rows[field.name].split("|")[1].strip().strip("`")
        if field.default is not None:
            assert shown == json.dumps(field.default).strip('"'), field.name


def test_every_environment_variable_is_listed():
    assert list(table_rows("variable", "default", "effect")) == list(envs.VARIABLES)


def test_the_table_of_families_names_those_that_are_tested():
    outcomes = json.loads((ROOT / "docs" / "model_families.json").read_text(encoding="utf-8"))
    assert [name for name in FAMILIES if name in outcomes["families"]] == list(outcomes["families"])
    assert list(outcomes["refused"]) == list(REFUSED)


@pytest.mark.slow
def test_generated_tables_are_the_code_s():
    """In a process of its own: which platform vLLM is on is settled once."""
    script = ROOT / "scripts" / "readme_tables.py"
    run = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
