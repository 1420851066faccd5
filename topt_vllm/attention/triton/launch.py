"""Launch parameters of the kernels: a small heuristic by device and shape. README.md gives the reasons."""

from dataclasses import dataclass
from functools import cache

import torch

# A program with fewer keys costs more in its partial result than it saves in time.
MIN_PROGRAM_TOKENS = 512
# Programs of four warps that a multiprocessor holds at once; `topt-vllm bench compile` checks it.
PROGRAMS_PER_MULTIPROCESSOR = 2
# From so many KV heads of sequences on, twice as many programs of two warps are faster: they wait less.
_MANY = 32
# Matrix instructions of all targets take rows of at least 16; NVIDIA's take columns of 8.
MATRIX_ROWS, MATRIX_COLUMNS = 16, 8
# Columns of scores from which on tiles have fewer keys.
_WIDE = 32
# Of one program's list. All programs' lists together, and what they are read beside, stay in the L2 cache.
_LIST_BYTES = 80 << 10
# With a K screen only the head of a list is used, that of candidates.
_SCREENED_LIST_BYTES = 2 * _LIST_BYTES
# Of a compute unit of gfx94x, all of which one workgroup may have; torch for ROCm (2.13) doesn't say.
_AMD_SHARED_BYTES = 64 << 10


@dataclass(frozen=True)
class GpuLimits:
    """What the heuristic knows of a GPU.

    Attributes:
        amd: Whether ROCm drives it.
        multiprocessors: Multiprocessors or compute units.
        shared_bytes: Shared memory of a multiprocessor for all of its blocks.
        block_bytes: Most of it for one block.
        tensor_memory: Whether products of 64 rows and 16 columns go through tensor memory, as on NVIDIA's sm_100.
        converts_fp8: Whether there is an instruction that converts e4m3, as on NVIDIA's sm_89 and later.
    """

    amd: bool
    multiprocessors: int
    shared_bytes: int
    block_bytes: int
    tensor_memory: bool = False
    converts_fp8: bool = False

    @classmethod
    def of(
        cls, capability: int | None, multiprocessors: int, shared_bytes: int, block_bytes: int
    ) -> "GpuLimits":
        """From NVIDIA's compute capability, such as 89 for 8.9; None for AMD."""
        return cls(
            amd=capability is None,
            multiprocessors=multiprocessors,
            shared_bytes=shared_bytes,
            block_bytes=block_bytes,
            tensor_memory=capability is not None and capability // 10 == 10,
            converts_fp8=capability is not None and capability >= 89,
        )


@dataclass(frozen=True)
class LaunchShape:
    """What the heuristic knows of a call.

    Attributes:
        max_query_rows: Most query rows of a sequence.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Of K or V, whichever is larger.
        item_bytes: Of an element of K and V in memory.
        screened: Whether keys go through a K screen.
        sequences: Of the batch.
        block_size: P.
    """

    max_query_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    screened: bool = False
    sequences: int = 1
    block_size: int = 16


@dataclass(frozen=True)
class Launch:
    """What the kernels are compiled and launched with; nothing in it depends on lengths or any other data.

    Attributes:
        rows: Query rows of one sequence that share a tile.
        columns: Columns of a tile of scores, at least rows * group.
        programs: Programs of one KV head, which share the keys of the whole batch.
        screened: Whether there is a K screen: the loop over keys reads its codes then.
        tile: Keys per iteration.
        list_keys: Keys that are scored before the V rows among them are read.
        candidates: Candidates of a K screen per iteration of the loop that reads their K.
        gather: V rows per iteration.
        num_warps: Of the decode kernel.
        key_stages: Depth of the software pipeline of the loop over keys.
        candidate_stages: That of the loop over candidates.
        value_stages: That of the loop over listed V rows.
        max_registers: Bound on its registers per thread; None for AMD.
        four_at_once: Whether PTX can be told to take four bytes of codes apart at once.
        converts_fp8: Whether there is an instruction that converts e4m3.
    """

    rows: int
    columns: int
    programs: int
    screened: bool
    tile: int
    list_keys: int
    candidates: int
    gather: int
    num_warps: int
    key_stages: int
    candidate_stages: int
    value_stages: int
    max_registers: int | None
    four_at_once: bool
    converts_fp8: bool

    @property
    def min_tiles(self) -> int:
        """Least tiles of a program."""
        return max(1, MIN_PROGRAM_TOKENS // self.tile)

    def chunks(self, max_query_rows: int) -> int:
        """Tiles that the query rows of one sequence are spread over."""
        return -(-max_query_rows // self.rows)


def choose(shape: LaunchShape, limits: GpuLimits, programs: int | None = None) -> Launch:
    """Launch parameters for a shape.

    Args:
        shape: Of the call.
        limits: GPU.
        programs: Fixed number of programs of a KV head instead of the heuristic's.
    """
    group = shape.num_heads // shape.num_kv_heads
    dim_pad = power_of_two(shape.head_dim)
    single, screened, item_bytes = shape.max_query_rows == 1, shape.screened, shape.item_bytes
    rows = 1 if single else max(1, MATRIX_ROWS // group)
    # AMD's matrix instructions, and those that tell rows of a group from others, take 16 columns. With heads of 512
    # they save registers: the query is then read from shared memory.
    few = single and not limits.amd and dim_pad < 512
    columns = power_of_two(max(rows * group, MATRIX_COLUMNS if few else MATRIX_ROWS))
    num_warps = 4
    # As many keys as registers allow without spills, and two programs' shared memory.
    tile = max(16, min(128, 8192 // dim_pad))
    if dim_pad <= 64 and (columns > MATRIX_COLUMNS or item_bytes == 1 or limits.shared_bytes < 128 << 10):
        tile = 64
    if not single and item_bytes == 1:
        tile = max(16, tile // 2)
    candidates = min(tile, 64)
    if screened:
        tile, candidates = _screen_tiles(columns, dim_pad, item_bytes, single, candidates)
    if not limits.amd:
        # The scores of a tile take as many registers whatever the group. (AMD has 512, and spills with fewer keys.)
        tile = max(16, tile * _WIDE // max(_WIDE, columns))
    candidates = min(candidates, tile)
    narrow = dim_pad <= 128 if screened else dim_pad <= 64 and item_bytes > 1
    many = shape.sequences * shape.num_kv_heads >= _MANY and shape.block_size % 64 == 0
    if columns == MATRIX_COLUMNS and narrow and many:
        num_warps, tile, candidates = 2, 64, 32
    if limits.tensor_memory and columns >= MATRIX_ROWS:
        tile = min(tile, 32)  # Triton 3.7 can't compile these loops with such products
        candidates = min(candidates, 32)
    entry_bytes = (8 if screened else 4) + 4 * rows * group
    list_bytes = _SCREENED_LIST_BYTES if screened else _LIST_BYTES
    list_keys = max(tile, power_of_two(list_bytes // entry_bytes + 1) // 2)
    gather = max(16, min(64, 4096 // dim_pad))
    row_bytes = dim_pad * item_bytes
    resident = PROGRAMS_PER_MULTIPROCESSOR * 4 // num_warps
    # What scores take on their way from thread to thread, and the query, as compiled.
    beside = 20 * tile * columns + 2 * dim_pad * columns
    if programs is None:
        programs = max(1, resident * limits.multiprocessors // shape.num_kv_heads)

    def stages(tile_bytes: int) -> int:
        return _stages(tile_bytes, beside, single, resident, limits)

    return Launch(
        rows=rows,
        columns=columns,
        programs=programs,
        screened=screened,
        tile=tile,
        list_keys=list_keys,
        candidates=candidates,
        gather=gather,
        num_warps=num_warps,
        key_stages=stages(tile * (dim_pad // 2 if screened else row_bytes)),
        candidate_stages=stages(candidates * row_bytes),
        value_stages=stages(gather * row_bytes),
        # Without a bound NVIDIA's assembler spills, to fit one more program.
        max_registers=None if limits.amd else 255,
        four_at_once=not limits.amd,
        converts_fp8=limits.converts_fp8,
    )


def _screen_tiles(
    columns: int, dim_pad: int, item_bytes: int, single: bool, candidates: int
) -> tuple[int, int]:
    """Keys whose codes, and candidates whose K are read at a time: as many as registers allow without spills.

    Codes are a quarter of K, so a tile may have more of them, but its scores take the same registers.
    """
    wide = dim_pad >= 256
    if columns == MATRIX_COLUMNS:
        return 64 if wide else 128, candidates
    tile = 16 if wide else 64 if single else 32
    return tile, min(candidates, 16 if item_bytes == 1 and not single else tile)


def _stages(tile_bytes: int, beside: int, single: bool, resident: int, limits: GpuLimits) -> int:
    """Pipeline stages of a loop over tiles: five for two tiles in flight, three for one."""
    if limits.amd:
        return 2 if single else 1  # its compiler fails on more with several rows
    room = min(limits.block_bytes, limits.shared_bytes // resident - (1 << 10))
    return 5 if 2 * tile_bytes + beside <= room else 3


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


@cache
def limits_of(device: torch.device) -> GpuLimits:
    """The GPU of tensors; one multiprocessor for the interpreter, which runs one program after another."""
    if device.type != "cuda":
        return GpuLimits(amd=False, multiprocessors=1, shared_bytes=228 << 10, block_bytes=227 << 10)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return GpuLimits.of(None, properties.multi_processor_count, _AMD_SHARED_BYTES, _AMD_SHARED_BYTES)
    return GpuLimits.of(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,
    )
