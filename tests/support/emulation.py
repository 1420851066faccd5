"""The CPU kernel's AVX-512 and AMX code on CPUs that lack the instructions: intrinsics become loops over lanes.

``pytest --emulate avx512`` and ``--emulate amx`` run tests on it, in the processes that import this; engines in
processes of their own have the CPU's kernel as ever.
"""

import shutil
from pathlib import Path

from topt_vllm.attention.cpu import jit, launcher

INSTRUCTIONS = ("avx512", "amx")
_HEADERS = Path(__file__).parent / "emulated"
# torch's vectors stay those of no capability: they would use the instructions.
_FLAGS = ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", "-Wno-psabi", "-Wno-ignored-attributes")
_EDITS = {
    "#if defined(CPU_CAPABILITY_AVX512)\n": '#include "avx512.h"\n#if 1\n',
    "using Vec = at::vec::Vectorized<float>;": "using Vec = emulated::Vec;",
}


def install(instructions: str, folder: Path) -> None:
    """Has this process compile and load the kernel with emulated instructions.

    Args:
        instructions: One of ``INSTRUCTIONS``.
        folder: Empty; for the sources.
    """
    shutil.copytree(launcher._FOLDER, folder, dirs_exist_ok=True)
    for header in _HEADERS.iterdir():
        shutil.copy(header, folder)
    vectors = folder / "vec16.h"
    text = vectors.read_text()
    for found, replacement in _EDITS.items():
        if text.count(found) != 1:
            raise RuntimeError(f"vec16.h has not one {found!r}; mend emulation.py")
        text = text.replace(found, replacement)
    vectors.write_text(text)
    amx = ("-DTOPT_EMULATED_AMX",) if instructions == "amx" else ()
    launcher._FOLDER = folder
    jit.capability = lambda: instructions
    jit.capability_flags = lambda _: (*_FLAGS, *jit._AVX2, *amx)
