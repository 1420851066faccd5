"""Compiles the Triton kernels for GPUs that need not be there, and reads off what the machine code takes.

The launches are those of the operator on tensors without memory (device ``meta``), so that what is compiled is what
would run; it also shows that no launch depends on the contents of a tensor. Limits of a multiprocessor: NVIDIA,
CUDA C++ Programming Guide, "Compute Capabilities"; AMD, CDNA 3 ISA guide (512 vector registers per lane and SIMD,
four SIMDs and 64 KiB of LDS per compute unit).
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from topt_vllm.attention.common import (
    DecodeBatch,
    KeyScreen,
    PagedCache,
    Selection,
    Thetas,
    choose_rows_per_state,
)
from topt_vllm.attention.margin import DEFAULT_MARGIN
from topt_vllm.attention.screen import ScreenTransform
from topt_vllm.attention.triton.arguments import screen_bytes
from topt_vllm.attention.triton.calls import Call, DecodeStep
from topt_vllm.attention.triton.finish_calls import codes_call, finish_call
from topt_vllm.attention.triton.launch import GpuLimits, Launch
from topt_vllm.attention.triton.launcher import new_statistics

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# (group, most query rows of a sequence, sequences): tiles of 8 columns, for few and for many sequences, and of 16,
# and several rows at once.
_TILES = ((4, 1, 1), (4, 1, 16), (16, 1, 16), (4, 8, 16))
# Tiles that span blocks, and blocks that span tiles.
_BLOCK_SIZES = (16, 64)

_KV_HEADS = 8
_CONTEXT = 32768
# More than 2 GiB, so that AMD's compiler can't address it with 32 bits.
_CACHE_BYTES = 8 << 30
_WARP_REGISTERS = 256  # registers are handed out to warps in units of this many


@dataclass(frozen=True)
class Chip:
    """A target and the limits of one of its multiprocessors.

    Attributes:
        triton: Triton's name of it.
        multiprocessors: Of the product that it stands for.
        shared_bytes: Shared memory.
        block_bytes: Most of it for one block.
        reserved_bytes: Shared memory that each block loses to the driver.
        registers: 32-bit registers of a lane's share: per multiprocessor (NVIDIA), per lane and SIMD (AMD).
        warps: Most resident warps.
        blocks: Most resident blocks.
    """

    triton: GPUTarget
    multiprocessors: int
    shared_bytes: int
    block_bytes: int
    reserved_bytes: int
    registers: int
    warps: int
    blocks: int

    @property
    def amd(self) -> bool:
        """Whether ROCm drives it."""
        return self.triton.backend == "hip"

    @property
    def limits(self) -> GpuLimits:
        """What the launch heuristic knows of it."""
        capability = None if self.amd else int(self.triton.arch)
        return GpuLimits.of(capability, self.multiprocessors, self.shared_bytes, self.block_bytes)

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Blocks that are resident on one multiprocessor at once."""
        by_memory = self.shared_bytes // max(1, shared_bytes + self.reserved_bytes)
        if self.amd:
            waves_per_simd = min(8, self.registers // max(1, -(-registers // 8) * 8))
            by_registers = waves_per_simd * 4 // num_warps
        else:
            warp = -(-registers * 32 // _WARP_REGISTERS) * _WARP_REGISTERS
            by_registers = self.registers // (warp * num_warps)
        return min(self.blocks, self.warps // num_warps, by_memory, by_registers)


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 108, 164 << 10, 163 << 10, 1 << 10, 65536, 64, 32),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 84, 100 << 10, 99 << 10, 1 << 10, 65536, 48, 16),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 142, 100 << 10, 99 << 10, 1 << 10, 65536, 48, 24),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 132, 228 << 10, 227 << 10, 1 << 10, 65536, 64, 32),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 148, 228 << 10, 227 << 10, 1 << 10, 65536, 64, 32),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 188, 100 << 10, 99 << 10, 1 << 10, 65536, 48, 24),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 0, 512, 32, 32),
}


@dataclass(frozen=True)
class Configuration:
    """What the code depends on.

    Attributes:
        head_dim: D.
        group: Query heads of a KV head.
        query_rows: Most query rows of a sequence.
        sequences: Of the batch.
        dtype: Of the cache, a key of ``DTYPES``; queries are bfloat16, or float16 with a float16 cache.
        block_size: P.
        sparse: Whether there are thresholds; without, every row is kept.
        softcap: 0 for none.
        screen: Whether keys go through a K screen.
        hard: Whether its bound is a hard one.
    """

    head_dim: int
    group: int
    query_rows: int
    sequences: int
    dtype: str
    block_size: int
    sparse: bool = True
    softcap: float = 0.0
    screen: bool = False
    hard: bool = False

    def __str__(self) -> str:
        parts = [f"D={self.head_dim}", f"group={self.group}", f"rows={self.query_rows}"]
        parts += [f"sequences={self.sequences}", self.dtype]
        parts += [f"P={self.block_size}", *([] if self.sparse else ["dense"])]
        parts += [*(["screen"] if self.screen else []), *(["hard"] if self.hard else [])]
        return " ".join([*parts, *([f"softcap={self.softcap:g}"] if self.softcap else [])])

    def step(self) -> DecodeStep:
        """A call on tensors without memory, in vLLM's GPU layout: K and V of a slot side by side."""
        rows, heads = self.sequences * self.query_rows, _KV_HEADS * self.group
        stored = DTYPES[self.dtype]
        query_dtype = stored if stored.itemsize == 2 else torch.bfloat16
        page = _KV_HEADS * self.block_size * 2 * self.head_dim
        blocks = _CACHE_BYTES // (page * stored.itemsize)
        shape = (blocks, _KV_HEADS, self.block_size, 2 * self.head_dim)
        key, value = _empty(*shape, dtype=stored).split(self.head_dim, dim=-1)
        scale = _empty(1, dtype=torch.float32) if stored.itemsize == 1 else None
        states = self.block_size // choose_rows_per_state(self.block_size)
        sums = _empty(blocks, _KV_HEADS, states, self.head_dim, dtype=torch.float32)
        table = _empty(self.sequences, _CONTEXT // self.block_size)
        batch = DecodeBatch(_empty(self.sequences + 1), _empty(self.sequences), table, self.query_rows)
        lengths = 6
        theta = _empty(heads, lengths, dtype=torch.float32)
        thetas = Thetas(_empty(lengths), theta, _empty(heads, 2, dtype=torch.float32))
        query = _empty(rows, heads, self.head_dim, dtype=query_dtype)
        return DecodeStep(
            query,
            PagedCache(key, value, sums, self._screen(blocks), scale, scale),
            batch,
            thetas if self.sparse else None,
            Selection(),
            self.head_dim**-0.5,
            self.softcap,
            torch.empty_like(query),
            new_statistics("meta"),
        )

    def _screen(self, blocks: int) -> KeyScreen | None:
        if not self.screen:
            return None
        channels = _empty(_KV_HEADS, self.head_dim, dtype=torch.float32)
        transform = ScreenTransform(channels, channels, channels[0])
        size = screen_bytes("int4", self.head_dim, self.block_size)
        codes = _empty(blocks, _KV_HEADS, size, dtype=torch.uint8)
        return KeyScreen("int4", transform, codes, None if self.hard else DEFAULT_MARGIN)


def shipped(head_dims: Sequence[int], dtypes: Sequence[str]) -> list[Configuration]:
    """Every kind of tile and block for these, without and with a K screen.

    Of each head dimension also one without thresholds, one with a softcap and one with a hard bound.
    """
    found = [
        Configuration(head_dim, *tile, dtype, block_size, screen=screen)
        for screen, head_dim, dtype, tile, block_size in product(
            (False, True), head_dims, dtypes, _TILES, _BLOCK_SIZES
        )
    ]
    for head_dim in head_dims:
        plain = Configuration(head_dim, 4, 1, 16, "bfloat16", 64)
        found += [replace(plain, sparse=False), replace(plain, softcap=50.0)]
        found += [replace(plain, softcap=50.0, screen=True), replace(plain, screen=True, hard=True)]
    return found


def compile_call(call: Call, target: GPUTarget) -> tuple[Any, str]:
    """Compiles one launch as Triton's own launcher would.

    Args:
        call: The launch.
        target: GPU.

    Returns:
        Triton's compiled kernel, and the log of NVIDIA's assembler (empty for AMD).
    """
    backend, kernel = make_backend(target), call.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**call.arguments)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options.__dict__)
    return compiled, log.getvalue()


def calls(configuration: Configuration, chip: Chip) -> tuple[Launch, dict[str, Call]]:
    """Launch parameters and the launches of a configuration by kernel name."""
    step = configuration.step()
    launch = step.choose(chip.limits, None)
    memory = _empty(sum(step.words(launch).values()), dtype=torch.float32)
    *queries, decode, merge = step.calls(launch, memory, interpreted=False)
    if step.cache.value_sums is None:
        raise RuntimeError("a configuration has V sums; this is a bug")
    finish = finish_call(step.cache, step.cache.value_sums, step.batch)
    launches = {"decode": decode, "merge": merge, "finish": finish}
    if step.screen is not None:
        launches |= {
            "queries": queries[0],
            "codes": codes_call(step.cache, step.screen, step.batch, launch.programs),
        }
    return launch, launches


def compile_all(configurations: list[Configuration], targets: list[str]) -> Iterator[dict[str, Any]]:
    """One record for each configuration, target and kernel."""
    for name in targets:
        chip = CHIPS[name]
        seen = set()
        for configuration in configurations:
            launch, launches = calls(configuration, chip)
            for kernel, call in launches.items():
                dependence = (kernel, *_dependence(configuration, kernel))
                if dependence in seen:
                    continue
                seen.add(dependence)
                compiled, log = compile_call(call, chip.triton)
                used = resources(compiled, log)
                num_warps = compiled.metadata.num_warps
                yield {
                    "target": name,
                    "kernel": kernel,
                    "config": str(configuration),
                    **asdict(configuration),
                    "tile": launch.tile if kernel == "decode" else None,
                    "gather": launch.gather if kernel == "decode" else None,
                    "num_warps": num_warps,
                    **used,
                    "occupancy": chip.occupancy(used["registers"], used["shared_bytes"], num_warps),
                }


def _dependence(configuration: Configuration, kernel: str) -> tuple[Any, ...]:
    """What a kernel's code depends on; that of the small ones on less than the configuration."""
    if kernel == "decode":
        return (configuration,)
    stored = (configuration.head_dim, configuration.dtype, configuration.block_size)
    if kernel == "queries":
        return (configuration.head_dim, configuration.group, configuration.dtype, configuration.hard)
    if kernel in ("finish", "codes"):
        return stored
    return (*stored, configuration.query_rows, configuration.sparse, configuration.screen)


def resources(compiled: Any, log: str) -> dict[str, int]:
    """Registers per thread, spills to memory (bytes per thread) and shared memory of a compiled kernel.

    AMD's scalar registers spill to lanes of vector registers, which takes no memory; ``scalar_spills`` counts them.
    """
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # type: ignore[index]  # noqa: E731
        registers, spills = field("vgpr_count"), field("private_segment_fixed_size")
        scalar_spills = field("sgpr_spill_count")
    else:
        registers = int(re.search(r"Used (\d+) registers", log)[1])  # type: ignore[index]
        spills, scalar_spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log)), 0
    return {
        "registers": registers,
        "spills": spills,
        "scalar_spills": scalar_spills,
        "shared_bytes": compiled.metadata.shared,
    }


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
