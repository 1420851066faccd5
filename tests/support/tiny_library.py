"""A library without torch headers, which compiles in a moment."""

from pathlib import Path

from topt_vllm.attention.cpu import jit

TINY = 'extern "C" int answer() { return 42; }\n'


def tiny_library(folder: Path) -> jit.Library:
    """Its source and a header, in a new folder."""
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    (folder / "tiny.h").write_text("// a header\n")
    return jit.Library("tiny", folder, ("tiny.cpp",), ("-O0", "-fPIC"), ("1.0",))
