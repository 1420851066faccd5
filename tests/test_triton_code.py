"""What the compilers make of the decode kernel, read off PTX and AMDGCN; nothing here needs a GPU."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest

pytestmark = pytest.mark.slow

COMPILE = """
import json, sys
from topt_vllm.benchmarks import compile as bench

configuration = bench.Configuration(128, 4, 1, "bfloat16", 16)
found = {}
for name in ("sm_90", "gfx942"):
    chip = bench.CHIPS[name]
    launches = bench.calls(configuration, chip)[1]
    compiled, log = bench.compile_call(launches["decode"], chip.triton)
    resources = bench.resources(compiled, log)
    numbers = (resources["registers"], resources["shared_bytes"], compiled.metadata.num_warps)
    code = compiled.asm["amdgcn" if chip.amd else "ptx"]
    found[name] = {"code": code, **resources, "occupancy": chip.occupancy(*numbers)}
print("RESULT " + json.dumps(found))
"""


@cache
def compiled() -> dict[str, dict]:
    """Machine code and resources by target; in a process of its own, for here Triton's interpreter is on."""
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


def skipped_regions(lines: list[str], branch: str, jump: str) -> list[list[str]]:
    """What each conditional branch passes over: from it to its target, or to a jump there.

    Args:
        lines: Of the program.
        branch: Pattern of a conditional branch whose first group is its target.
        jump: Unconditional branch instruction.
    """
    regions = []
    for number, line in enumerate(lines):
        found = re.search(branch, line)
        if not found:
            continue
        join = re.compile(rf"({re.escape(found[1])}:|{jump}\s+{re.escape(found[1])}\b)")
        end = next((i for i in range(number, len(lines)) if join.match(lines[i])), None)
        if end is not None:
            regions.append(lines[number + 1 : end])
    return regions


def test_ptx_branches_over_the_v_tile_and_loads_its_rows_by_predicate():
    lines = [line.strip() for line in compiled()["sm_90"]["code"].splitlines()]
    regions = skipped_regions(lines, r"@!?%p\d+ bra\s+(\$L\w+);", r"bra\.uni")
    tiles = [part for part in regions if any("mma." in line for line in part)]
    assert tiles, "no branch skips a matrix product"
    tile = min(tiles, key=len)
    loads = [line for line in tile if "ld.global" in line]
    # 64 rows of 256 bytes by 128 threads, 16 bytes each: 8 loads per thread, each of another row.
    assert len(loads) == 8
    assert all("v4.b32" in line for line in loads)
    predicates = [re.match(r"@(%p\d+) ", line) for line in loads]
    assert all(predicates), loads
    assert len({found[1] for found in predicates}) == 8
    # K is not in the branch: it is copied ahead of its use for every tile.
    assert not any("cp.async" in line for line in tile)
    assert any("cp.async" in line for line in lines)


def test_amdgcn_branches_over_the_v_tile_and_masks_its_rows():
    lines = [line.strip() for line in compiled()["gfx942"]["code"].splitlines()]
    regions = skipped_regions(lines, r"s_cbranch_\w+ (\.LBB\w+)", "s_branch")
    loads = r"global_load_dwordx4"
    tiles = [part for part in regions if sum(loads in line for line in part) >= 4]
    assert tiles, "no branch skips the loads of a tile"
    tile = min(tiles, key=len)
    # 64 rows of 256 bytes by 256 lanes, 16 bytes each: 4 loads per lane, each with an execution mask of its own.
    places = [number for number, line in enumerate(tile) if loads in line]
    assert len(places) == 4
    for previous, place in zip([0, *places], places, strict=False):
        assert any("saveexec" in line for line in tile[previous:place]), tile[previous : place + 1]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_spills_and_two_blocks_fit(target: str):
    assert compiled()[target]["spills"] == 0
    assert compiled()[target]["occupancy"] >= 2
