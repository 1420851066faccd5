"""Threshold tables from strangers: whatever the bytes, a table that can be served or one clear error.

Four kinds of input with 2,500 cases each. Inputs that are made to exhaust a reader, such as a billion laughs, run
in a process whose memory and CPU time the kernel bounds.
"""

import copy
import math
import random
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_factory import make_table

from topt_vllm.table.file import dumps, load
from topt_vllm.table.schema import ThresholdTableError
from topt_vllm.table.yaml import MAX_BYTES

pytestmark = pytest.mark.slow

CASES = settings(
    max_examples=2500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
VALID = dumps(make_table())
FRAGMENTS = [
    "!!python/object/apply:os.system ['touch canary']",
    "!!python/name:os.system",
    "!!binary aGk=",
    "!!float 1",
    "! x",
    "&a [1, 2]",
    "*a",
    "<<: *a",
    "{<<: {k: 1}}",
    "? [1, 2] : 3",
    "- " * 40,
    "[" * 40,
    "{a: " * 40,
    "1.0e+400",
    "1e400",
    "-.inf",
    ".NaN",
    "9" * 400,
    "0x" + "f" * 50,
    "1:30:59",
    "1_000",
    "0777",
    "2026-11-21",
    "~",
    "yes",
    "=",
    "---\n",
    "...\n",
    "%TAG ! x\n",
    "\ufeff",
    "\u2028",
    "\x85",
    '"\\ud800"',
    "😀",
    "\t",
    "# c\n",
    "|2\n",
    ">-\n",
    "k: 1\nk: 1\n",
    "'",
    '"',
    ": ",
    ", ",
    "\n",
    "\n  ",
    "- 1\n",
    "schema_version: 1\n",
    "budgets:\n",
    "\x00",
]
WILD = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            "",
            "x" * 200,
            "no",
            "1.5",
            0,
            -1,
            10**18,
            10**400,
            2**31,
            2**63,
            1e308,
            -1e39,
            1e-320,
            math.inf,
            math.nan,
            [],
            {},
            [[]],
            [None],
            [0, 0],
            {"": None},
            {1: 2},
            {None: []},
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.floats() | st.integers(-5, 5), max_size=6),
)


class NoAliases(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes every value out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def judge(path: Path, content: bytes) -> bool:
    """Whether the content is a table; then it must serve and come back as it was, else the error must be short."""
    path.write_bytes(content)
    try:
        table = load(path)
    except ThresholdTableError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.startswith(f"{path}: ")
        assert len(message) < 1500
        return False
    for budget in table.budgets:
        for thetas in budget.thetas(table.lengths).values():
            assert torch.isfinite(thetas.theta).all()
            assert torch.isfinite(thetas.law).all()
            assert (thetas.lengths > 0).all()
    path.write_text(dumps(table), encoding="utf-8")
    assert load(path) == table
    return True


@CASES
@given(content=st.binary(max_size=300))
def test_bytes(tmp_path, content):
    assert not judge(tmp_path / "t.yaml", content)


@CASES
@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=25))
def test_pieces_of_yaml(tmp_path, parts):
    assert not judge(tmp_path / "t.yaml", "".join(parts).encode("utf-8", "surrogatepass"))


@CASES
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 60), st.sampled_from(FRAGMENTS)),
        min_size=1,
        max_size=3,
    )
)
def test_valid_table_with_other_text_inside(tmp_path, edits):
    text = VALID
    for position, removed, fragment in edits:
        text = text[:position] + fragment + text[position + removed :]
    judge(tmp_path / "t.yaml", text.encode())


@CASES
@given(seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3), wild=WILD)
def test_valid_table_with_other_values(tmp_path, seeds, wild):
    content = make_table().model_dump()
    for seed in seeds:
        mutate(content, random.Random(seed), wild)
    judge(tmp_path / "t.yaml", yaml.dump(content, Dumper=NoAliases, allow_unicode=True).encode("utf-8"))


def mutate(content: Any, choice: random.Random, wild: Any) -> None:
    """Replaces, removes, doubles or moves one value somewhere in the content."""
    while True:
        key = choice.choice(list(content) if isinstance(content, dict) else range(len(content)))
        child = content[key]
        if not (isinstance(child, dict | list) and child and choice.random() < 0.8):
            break
        content = child
    action = choice.randrange(4)
    if action == 0:
        content[key] = copy.deepcopy(wild)
    elif action == 1:
        del content[key]
    elif action == 2 and isinstance(content, list):
        content.insert(choice.randrange(len(content) + 1), copy.deepcopy(content[key]))
    else:
        content[key] = [content[key]] if choice.random() < 0.5 else {"k": content[key]}


def test_mutations_reach_tables_that_load(tmp_path):
    """The fuzzing above is worth something only if part of its inputs get past every check."""
    loaded = 0
    for seed in range(300):
        content = make_table().model_dump()
        mutate(content, random.Random(seed), 1.5)
        loaded += judge(tmp_path / "t.yaml", yaml.dump(content, Dumper=NoAliases).encode())
    assert 5 < loaded < 200


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(20)
)
MEGA = 1 << 20
HOSTILE = {
    "billion laughs": (LAUGHS, "anchor &a"),
    "merged laughs": ("a: &a {k: 1}\n" + "b: {<<: [" + "*a, " * 1000 + "]}\n", "anchor &a"),
    "alias of its own parent": ("&a [*a]\n", "anchor &a"),
    # PyYAML 6.0.4 has a limit of its own, which these meet first.
    "flow nesting": ("[" * MEGA, "nested more than|maximum nesting depth"),
    "mapping nesting": ("{a: " * MEGA, "nested more than|maximum nesting depth"),
    "block nesting": ("- " * MEGA, "nested more than"),
    "complex keys": ("? " * MEGA, "is no text|nested more than|not valid YAML"),
    "directives": ("%TAG !a! x\n" * MEGA, "begins with %"),
    "documents": ("---\n1\n" * MEGA, "a second document"),
    "endless number": ("schema_version: " + "1" * MEGA, "schema_version is '111"),
    "sexagesimal number": ("schema_version: 1" + ":1" * 30, "in decimal"),
    "million wrong numbers": (
        re.sub("(?m)^lengths: .*", "lengths: [" + "a," * 1_500_000 + "]", VALID),
        r"lengths\[0\]: ",
    ),
    "million values too many": ("a: [" + "1," * (5 * MEGA) + "]", "too many for a threshold table"),
    "million keys": ("".join(f"k{i}: 1\n" for i in range(MEGA // 2)), "more than 256 keys"),
    "million layers": (
        VALID.replace("num_layers: 3", "num_layers: 999999999999"),
        "model.num_layers: must be",
    ),
    "million budgets": (VALID[: VALID.index("budgets:")] + "budgets:\n" + "- {}\n" * MEGA, "budgets"),
    "long text": (VALID + "x: " + "y" * (8 * MEGA), "x: unknown key"),
    "long key": (VALID + "? " + "y" * (8 * MEGA) + "\n: 1", "yyy: unknown key"),
    "long anchor": ("a: &" + "y" * MEGA + " 1", "anchor &yyy"),
    "long tag": ("a: !" + "y" * MEGA + " 1", "tag !yyy"),
    "open quote": ('a: "' + "\\n" * MEGA, "not valid YAML"),
    "spaces": (" " * (8 * MEGA), "a mapping was expected"),
    "comments": ("#\n" * (4 * MEGA), "a mapping was expected"),
    "too large": (" " * (MAX_BYTES + 1), "too large"),
    "code": ("a: !!python/object/apply:os.system ['touch canary']", "tag tag:yaml.org"),
    "module": ("a: !!python/module:antigravity", "tag tag:yaml.org"),
    "a key twice": (VALID.replace("lengths:", "lengths: [7]\nlengths:"), "key 'lengths' stands twice"),
    "a nested key twice": (VALID.replace("- k: 64\n", "- k: 64\n  k: 65\n"), "key 'k' stands twice"),
}
BOUNDED = """
import resource, sys
from topt_vllm.table.file import load
from topt_vllm.table.schema import ThresholdTableError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for path in sys.argv[1:]:
    try:
        load(path)
        print("loaded")
    except ThresholdTableError as error:
        print(str(error).removeprefix(path + ": ").replace(chr(10), " "))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_hostile_files_are_refused_within_bounds(tmp_path):
    """All of them in one process with 120 s of CPU time and 1 GiB of memory, beyond which it would die."""
    paths = []
    for i, (text, _) in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{i}.yaml")
        paths[-1].write_text(text, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    print(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before:.0f} s of CPU time")
    assert done.returncode == 0, done.stderr[-2000:]
    answers = done.stdout.splitlines()
    assert len(answers) == len(HOSTILE)
    for name, (_, expected), answer in zip(HOSTILE, HOSTILE.values(), answers, strict=True):
        assert re.search(expected, answer), f"{name}: {answer}"
        assert len(answer) < 1500
    assert not (tmp_path / "canary").exists()


def test_what_is_no_file_is_refused(tmp_path):
    for path in ("/dev/zero", str(tmp_path)):
        with pytest.raises(ThresholdTableError, match="not a file"):
            load(path)
    with pytest.raises(ThresholdTableError, match="can't be read"):
        load("a\0b")
