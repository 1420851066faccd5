"""What the compilers make of the kernels, read off PTX and AMDGCN; nothing here needs a GPU."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from topt_vllm.benchmarks import compile as bench

pytestmark = pytest.mark.slow

COMPILE = """
import json, sys
from topt_vllm.benchmarks import compile as bench

configuration = bench.Configuration(128, 4, 1, 16, "bfloat16", 64)
found = {}
for name in ("sm_90", "gfx942"):
    chip = bench.CHIPS[name]
    launches = bench.calls(configuration, chip)[1]
    found[name] = {}
    for kernel, launch in launches.items():
        compiled, log = bench.compile_call(launch, chip.triton)
        resources = bench.resources(compiled, log)
        numbers = (resources["registers"], resources["shared_bytes"], compiled.metadata.num_warps)
        code = compiled.asm["amdgcn" if chip.amd else "ptx"]
        found[name][kernel] = {"code": code, **resources, "occupancy": chip.occupancy(*numbers)}
screened = bench.Configuration(128, 4, 1, 16, "fp8_e4m3", 64, screen=True)
chip = bench.CHIPS["sm_90"]
compiled, log = bench.compile_call(bench.calls(screened, chip)[1]["decode"], chip.triton)
found["screen of fp8"] = {"code": compiled.asm["ptx"], **bench.resources(compiled, log)}
drafted = bench.Configuration(128, 8, 6, 1024, "bfloat16", 64)
for kernel in ("decode", "merge"):
    compiled, log = bench.compile_call(bench.calls(drafted, chip)[1][kernel], chip.triton)
    found[f"{kernel} of many items"] = bench.resources(compiled, log)
print("RESULT " + json.dumps(found))
"""


@cache
def compiled() -> dict[str, dict]:
    """Machine code and resources by target and kernel; in another process, for here Triton's interpreter is on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stderr[-3000:]
    return json.loads(results[0].removeprefix("RESULT "))


def loops(lines: list[str], branch: str) -> list[list[str]]:
    """Bodies of the innermost loops: what lies between a label and a branch back to it, without a loop inside.

    Args:
        lines: Of the program.
        branch: Pattern of a branch whose first group is its target.
    """
    labels, found = {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"([$.]\w+):", line):
            labels[label[1]] = number
        elif (back := re.search(branch, line)) and back[1] in labels:
            found.append((labels[back[1]], number))
    inner = [
        (first, last)
        for first, last in found
        if not any(first <= start and end <= last and (first, last) != (start, end) for start, end in found)
    ]
    return [lines[first:last] for first, last in inner]


def count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def ptx_loops() -> list[list[str]]:
    """Of the decode kernel for sm_90, those with products: over keys, over listed V rows."""
    lines = [line.strip() for line in compiled()["sm_90"]["decode"]["code"].splitlines()]
    return [loop for loop in loops(lines, r"@!?%p\d+ bra\s+(\$L\w+);") if count(loop, r"\bmma\.|wgmma")]


def test_k_and_v_are_copied_ahead_of_their_use_on_nvidia():
    """Products take what copies of earlier iterations brought; nothing is loaded and waited for."""
    tiles = ptx_loops()
    # 16 bytes by each of 128 threads: a K tile has 64 rows of 256 bytes, a tile of listed V rows 32, and scores.
    assert [count(loop, r"cp\.async\.cg.*0x10") for loop in tiles] == [8, 5]
    assert not any(count(loop, r"ld\.global") for loop in tiles)


def test_keys_are_listed_with_few_barriers_on_nvidia():
    """Two for the copies, two for the word of choices, two for scores that change threads to be stored together."""
    (keys,) = [loop for loop in ptx_loops() if count(loop, r"st\.global")]
    assert count(keys, r"bar\.sync|barrier\.sync") <= 8
    # The portable count of bits becomes the one instruction.
    assert count(keys, r"popc\.b64") in (2, 3)


def test_a_k_screen_of_fp8_takes_few_instructions():
    """Codes are taken apart four at once, and the stream over them has no barrier but its copies' own."""
    screen = compiled()["screen of fp8"]
    assert screen["spills"] == 0
    lines = [line.strip() for line in screen["code"].splitlines()]
    inner = loops(lines, r"@!?%p\d+ bra\s+(\$L\w+);")
    (stream,) = [loop for loop in inner if count(loop, r"mma\..*s8")]
    assert count(stream, r"and\.b32 .*0x0F0F0F0F") == 32
    assert count(stream, r"bar\.sync|barrier\.sync") <= 3
    # K of candidates, and V: two bytes by one instruction.
    gathered = [count(loop, r"cvt\.rn\.f16x2\.e4m3x2") for loop in inner]
    assert sorted(filter(None, gathered)) == [32, 32]


def test_bits_are_counted_by_one_instruction_on_amd():
    assert "v_bcnt_u32_b32" in compiled()["gfx942"]["decode"]["code"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["decode", "merge", "finish"])
def test_two_programs_fit_and_nothing_spills_to_memory(target: str, kernel: str):
    found = compiled()[target][kernel]
    assert found["spills"] == 0
    assert found["occupancy"] >= 2


@pytest.mark.parametrize("kernel", ["decode", "merge"])
def test_batches_of_any_size_spill_nothing(kernel: str):
    """As many sequences as vLLM allows on a large GPU by default, in several chunks of drafted rows each."""
    assert compiled()[f"{kernel} of many items"]["spills"] == 0


@pytest.mark.parametrize("change", [{"sparse": False}, {"screen": True}], ids=str)
def test_no_tensor_of_a_batch_stands_in_for_one_that_is_not_read(change: dict[str, bool]):
    """vLLM's microbatches begin anywhere in theirs, and Triton compiles again for a pointer aligned otherwise."""
    configuration = bench.Configuration(128, 4, 1, 16, "bfloat16", 64, **change)
    _, launches = bench.calls(configuration, bench.CHIPS["sm_90"])
    for kernel in launches.keys() - {"queries"}:
        arguments = launches[kernel].arguments
        same = [name for name, value in arguments.items() if value is arguments["seq_lens"]]
        assert same == ["seq_lens"], kernel
