"""The example of docs/cache_formats.md against the standard's formula, in fractions."""

import re
import subprocess
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).parents[1]


def exact(code: int) -> Fraction:
    """Value of a posit above 0 as the standard of 2022 writes it: (1 + f) · 2^(4r + e)."""
    bits = f"{code:07b}"
    run = len(bits) - len(bits.lstrip(bits[0]))
    regime = run - 1 if bits[0] == "1" else -run
    rest = bits[run + 1 :]
    exponent, fraction = rest[:2].ljust(2, "0"), rest[2:]
    f = Fraction(int(fraction, 2), 2 ** len(fraction)) if fraction else Fraction(0)
    return (1 + f) * Fraction(2) ** (4 * regime + int(exponent, 2))


def test_the_example_gives_the_values_of_the_standard(tmp_path: Path) -> None:
    page = (ROOT / "docs/cache_formats.md").read_text(encoding="utf-8")
    block = re.search(r"```cpp\n(.*?)```", page, re.DOTALL)
    header = (ROOT / "topt_vllm/attention/cpu/csrc/bytes.h").read_text(encoding="utf-8")
    power = re.search(r"^constexpr float power_of_two.*$", header, re.MULTILINE)
    assert block is not None
    assert power is not None
    values = {code: float(exact(code)).hex() for code in range(1, 128)} | {0: "0.0"}
    program = tmp_path / "example.cpp"
    checks = "\n".join(
        f"static_assert(Posit8::magnitude({code}) == {value}f);" for code, value in values.items()
    )
    program.write_text(
        f"#include <bit>\n#include <cstdint>\n{power[0]}\n{block[1]}\n{checks}\n", encoding="utf-8"
    )
    subprocess.run(["g++", "-std=c++20", "-fsyntax-only", program], check=True)
