"""The K screen: a low-bit copy of K, the scores that it gives, and how far off they may be.

A row k [D] of one KV head is stored as the codes of

    z = R((k − mean) / scale),    R = Hadamard · diag(signs), block by block and not normalised,

with mean and scale of each channel calibrated: rotated so, all channels have about the same error. A row has one
step, the float16 not below max |z| / 8. An 8-bit code is floor(16 z / step), from −128 to 127, and stands for
(code + ½) step / 16. Its upper four bits are plane one, floor codes of z / step by themselves, which stand for
(code + ½) step; its lower four are plane two.

A score follows with q' = R(scale ∘ q) / b, b the size of a Hadamard block:  q·k = q·mean + q'·z.  Plane one's is
made of the query's own 8-bit codes, so that its sum is one of integers; what both planes give takes q' as it is.

The error of plane one is about uniform in each channel, so that of a score is normal with the standard deviation
NOISE · step · |q'|. A margin is so many of those; or, for a hard bound, what Cauchy and Schwarz allow: |q'| times
the norm of z − (code + ½) step, which is stored too.

All of this is single precision, in the order given here: so implementations agree to the bit on codes and steps.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch

ScreenFormat = Literal["int4", "int4+4"]
"""What decides on candidates: ``int4`` their exact K, ``int4+4`` plane two, so that K isn't read at all."""

# Of a floor code's error in steps: 1 / √12.
NOISE = 0.2887
# Hard bounds also cover the rounding of both scores.
_SLACK = 1.01


def rotation_signs(seed: int, head_dim: int) -> torch.Tensor:
    """Random signs of the channels, float32 [D]; the same on every platform."""
    bits = random.Random(seed).getrandbits(head_dim)
    return torch.tensor([1.0 - 2.0 * (bits >> channel & 1) for channel in range(head_dim)])


def hadamard_block(head_dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides D."""
    return head_dim & -head_dim


def rotate(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """R of float32 [..., D]: signs, then butterflies over neighbours at distance 1, 2, 4, …"""
    dim = x.shape[-1]
    x = x * signs
    distance = 1
    while distance < hadamard_block(dim):
        pairs = x.unflatten(-1, (dim // (2 * distance), 2, distance))
        low, high = pairs.unbind(-2)
        x = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        distance *= 2
    return x


def rounded_up(x: torch.Tensor) -> torch.Tensor:
    """The least float16 not below x ≥ 0; infinite beyond float16, NaN of NaN."""
    rounded = x.half()
    below = rounded.float() < x
    return torch.where(below, rounded.view(torch.int16) + 1, rounded.view(torch.int16)).view(torch.float16)


@dataclass(frozen=True)
class EncodedKeys:
    """Rows of K as they are stored.

    Attributes:
        codes: int8 [..., D], both planes.
        step: float16 [...], that of plane one. NaN for a row that can't be stored, for K isn't finite or too large:
            its score is NaN, so it is always a candidate.
        error: float16 [...], norm of what plane one leaves of z, rounded up.
    """

    codes: torch.Tensor
    step: torch.Tensor
    error: torch.Tensor

    @property
    def plane_one(self) -> torch.Tensor:
        """float32 [..., D], −8 to 7."""
        return (self.codes >> 4).float()


@dataclass(frozen=True)
class ScreenQueries:
    """Queries of one row as the screen takes them.

    Attributes:
        rotated: float32 [H, D], q'.
        codes: float32 [H, D], integers from −127 to 127: q' in ``step``.
        step: float32 [H].
        offset: float32 [H], q·mean.
    """

    rotated: torch.Tensor
    codes: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor

    @property
    def norm(self) -> torch.Tensor:
        """|q'|, float32 [H]."""
        return self.rotated.norm(dim=-1)


@dataclass(frozen=True)
class ScreenTransform:
    """What is calibrated of one layer's K, on one rank.

    Attributes:
        mean: float32 [Hkv, D].
        scale: float32 [Hkv, D], above 0.
        signs: float32 [D], 1 or −1.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    signs: torch.Tensor

    def to(self, device: torch.device) -> "ScreenTransform":
        """The same on a device."""
        return ScreenTransform(self.mean.to(device), self.scale.to(device), self.signs.to(device))

    def heads(self, start: int, count: int) -> "ScreenTransform":
        """The part of a tensor-parallel rank: ``count`` KV heads from ``start``."""
        part = slice(start, start + count)
        return ScreenTransform(self.mean[part].contiguous(), self.scale[part].contiguous(), self.signs)

    def encode(self, key: torch.Tensor) -> EncodedKeys:
        """Rows of K, [Hkv, n, D]."""
        z = rotate((key.float() - self.mean[:, None]) * (1.0 / self.scale)[:, None], self.signs)
        step = rounded_up(z.abs().amax(dim=-1) / 8.0)
        step = torch.where(step.isfinite(), step, torch.nan)
        wide = step.float()[..., None]
        inverse = torch.where(wide > 0, 16.0 / wide, 0.0)
        codes = (z * inverse).floor().nan_to_num(0.0).clamp(-128, 127).to(torch.int8)
        encoded = EncodedKeys(codes, step, step)
        error = (z - (encoded.plane_one + 0.5) * wide).norm(dim=-1)
        return EncodedKeys(codes, step, rounded_up(_SLACK * error))

    def queries(self, query: torch.Tensor) -> ScreenQueries:
        """Queries of one row, [H, D]."""
        grouped = query.float().unflatten(0, (self.mean.shape[0], -1))
        rotated = rotate(grouped * self.scale[:, None], self.signs) / hadamard_block(query.shape[-1])
        rotated = rotated.flatten(0, 1)
        largest = rotated.abs().amax(dim=-1)
        inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
        codes = (rotated * inverse[:, None]).round()
        offset = (grouped * self.mean[:, None]).sum(dim=-1).flatten()
        return ScreenQueries(rotated, codes, largest / 127.0, offset)


def screen_scores(
    queries: ScreenQueries, keys: EncodedKeys, margin: float | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What plane one says of one row's scores, without a softcap.

    Args:
        queries: H query heads.
        keys: Hkv heads of n keys.
        margin: Standard deviations; None for a hard bound.
        scale: Factor of q·k.

    Returns:
        The scores, float32 [H, n], and what the true ones hardly exceed: NaN for keys that can't be told.
    """
    group = queries.codes.shape[0] // keys.codes.shape[0]
    grouped = queries.codes.unflatten(0, (-1, group))
    # Exact in single precision: sums of up to 512 products of 8 and 127.
    sums = (grouped @ keys.plane_one.transpose(1, 2)).flatten(0, 1) + 0.5 * queries.codes.sum(-1)[:, None]
    step = keys.step.float().repeat_interleave(group, dim=0)
    offset = queries.offset[:, None]
    scores = scale * (step * (sums * queries.step[:, None]) + offset)
    if margin is None:
        unseen = (queries.rotated - queries.codes * queries.step[:, None]).norm(dim=-1)
        by_step = _SLACK * 8.0 * math.sqrt(queries.codes.shape[-1]) * unseen
        error = keys.error.float().repeat_interleave(group, dim=0)
        bound = step * by_step[:, None] + error * (_SLACK * queries.norm)[:, None]
        # As large as what rounding may add to q·mean.
        bound = bound + 1e-4 * (scores / scale).abs()
    else:
        bound = step * (margin * NOISE * queries.norm)[:, None]
    return scores, scores + scale * bound


def refined_scores(queries: ScreenQueries, keys: EncodedKeys, scale: float) -> torch.Tensor:
    """What both planes together say of one row's scores, without a softcap: float32 [H, n]."""
    group = queries.rotated.shape[0] // keys.codes.shape[0]
    grouped = queries.rotated.unflatten(0, (-1, group))
    sums = (grouped @ (keys.codes.float() + 0.5).transpose(1, 2)).flatten(0, 1)
    step = keys.step.float().repeat_interleave(group, dim=0) / 16.0
    return scale * (step * sums + queries.offset[:, None])
