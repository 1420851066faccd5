"""The documents name every setting with its default, their tables are the code's, and what they point to exists."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from model_families import REFUSED, SERVED

from topt_vllm import envs
from topt_vllm.config import TopThetaConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def table_rows(*heads: str) -> dict[str, str]:
    """First column without backticks → the rest, of the table whose header has these columns."""
    header = "| " + " | ".join(heads) + " |"
    body = CONFIGURATION.partition(header)[2].partition("\n\n")[0]
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


def test_the_table_of_families_names_those_that_are_served():
    outcomes = json.loads((DOCS / "model_families.json").read_text(encoding="utf-8"))
    assert list(outcomes["families"]) == list(SERVED)
    assert list(outcomes["refused"]) == list(REFUSED)


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path):
    without_code = re.sub(r"`[^`]*`", "", document.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_files_that_recipes_name_exist():
    """By their path in the checkout, in the package or in its folders of kernels."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "topt_vllm"
    places = [ROOT, package, package / "attention", package / "attention" / "cpu"]
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|h|cpp|sh|md|json))`", text))
    assert named
    for name in sorted(named):
        assert any((place / name).is_file() for place in places) or "NAME" in name, name


@pytest.mark.slow
def test_generated_tables_are_the_code_s():
    """In a process of its own: which platform vLLM is on is settled once."""
    script = ROOT / "scripts" / "docs_tables.py"
    run = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
