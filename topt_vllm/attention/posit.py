"""Posits of 8 bits (Posit Standard 2022: two bits of exponent) as uint8 codes, decoded exactly and rounded to.

A code is a sign, a regime (a run of r equal bits and the bit that ends it), two bits of exponent and the rest of
a fraction; bits that don't fit are zeros. The value is (1 + fraction) · 2^(4k + exponent) with k = r − 1 for ones
and −r for zeros. A negative number has the code of its magnitude as two's complement; 0x80 is no number.
"""

from functools import cache

import torch

_EXPONENT_BITS = 2
_NOT_A_NUMBER = 0x80


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of uint8 codes; 0x80 becomes NaN."""
    return _values()[codes.int()]


def encode(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest posits, as the standard rounds.

    Nearest means on the codes: what separates two posits is the one of 9 bits between them, and from it the even
    code is taken. Nothing but 0 becomes 0, nothing overflows, and what is not finite becomes 0x80.
    """
    magnitude = values.float().abs()
    bounds = _bounds()
    below = torch.searchsorted(bounds, magnitude.contiguous())
    code = below + 1
    tie = (below < len(bounds)) & (magnitude == bounds[below.clamp(max=len(bounds) - 1)])
    code += tie & (code % 2 == 1)
    code = torch.where(magnitude == 0, 0, code)
    code = torch.where(values < 0, (256 - code) % 256, code)
    return torch.where(magnitude.isfinite(), code, _NOT_A_NUMBER).to(torch.uint8)


@cache
def _values() -> torch.Tensor:
    """float32 [256], by code."""
    positive = [_magnitude(code, 8) for code in range(128)]
    negative = [-positive[256 - code] for code in range(129, 256)]
    return torch.tensor([*positive, float("nan"), *negative])


@cache
def _bounds() -> torch.Tensor:
    """float32 [126], what separates the positive posits: those of 9 bits between them."""
    return torch.tensor([_magnitude(2 * code + 1, 9) for code in range(1, 127)])


def _magnitude(code: int, bits: int) -> float:
    """Value of a code of some bits whose sign is 0."""
    if code == 0:
        return 0.0
    body = f"{code:0{bits - 1}b}"
    run = len(body) - len(body.lstrip(body[0]))
    rest = body[run + 1 :]
    exponent = int(rest[:_EXPONENT_BITS].ljust(_EXPONENT_BITS, "0"), 2)
    fraction = rest[_EXPONENT_BITS:]
    regime = run - 1 if body[0] == "1" else -run
    significand = 1 + (int(fraction, 2) / 2 ** len(fraction) if fraction else 0)
    return significand * 2.0 ** (regime * 2**_EXPONENT_BITS + exponent)
