"""Posits of 8 bits: every code against the standard's formula in fractions, and rounding against all neighbours."""

from fractions import Fraction

import torch

from topt_vllm.attention import posit

CODES = torch.arange(256, dtype=torch.uint8)


def exact(code: int, bits: int) -> Fraction | None:
    """Value of a posit as the standard of 2022 writes it: ((1 − 3s) + f) · 2^((1 − 2s)(4r + e + s)); None for NaR.

    The fields are read off the code as it stands: no complement is taken of a negative one.
    """
    if code == 0:
        return Fraction(0)
    if code == 1 << (bits - 1):
        return None
    word = [code >> i & 1 for i in reversed(range(bits))]
    sign, rest = word[0], word[1:]
    run = next((i for i, bit in enumerate(rest) if bit != rest[0]), len(rest))
    regime = run - 1 if rest[0] else -run
    tail = [*rest[run + 1 :], 0, 0]
    exponent = 2 * tail[0] + tail[1]
    fraction = sum((Fraction(bit, 2 ** (i + 1)) for i, bit in enumerate(tail[2:])), Fraction(0))
    power = (1 - 2 * sign) * (4 * regime + exponent + sign)
    return (1 - 3 * sign + fraction) * Fraction(2) ** power


def test_every_code_has_the_value_of_the_standard():
    values = posit.decode(CODES)
    assert values[0x80].isnan()
    for code in (*range(128), *range(129, 256)):
        assert Fraction(float(values[code])) == exact(code, 8), code
    # Known corners: one, the largest, the smallest.
    assert (float(values[0x40]), float(values[0x7F]), float(values[0x01])) == (1.0, 2.0**24, 2.0**-24)


def test_values_keep_their_codes():
    assert torch.equal(posit.encode(posit.decode(CODES)), CODES)
    assert posit.encode(torch.tensor([torch.inf, -torch.inf, torch.nan])).tolist() == [0x80] * 3


def test_rounding_turns_at_the_posits_of_nine_bits_and_ties_go_to_even_codes():
    for code in range(1, 127):
        turn = float(exact(2 * code + 1, 9))
        near = torch.tensor([turn, turn]).nextafter(torch.tensor([0.0, torch.inf]))
        assert posit.encode(near).tolist() == [code, code + 1]
        assert posit.encode(-near).tolist() == [256 - code, 255 - code]
        assert posit.encode(torch.tensor([turn])).item() == code + code % 2


def test_nothing_underflows_or_overflows():
    ends = torch.tensor([1e-38, -1e-38, 3e38, -3e38])
    assert posit.encode(ends).tolist() == [0x01, 0xFF, 0x7F, 0x81]
