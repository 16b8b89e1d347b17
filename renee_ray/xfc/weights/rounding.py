"""Stochastic rounding of fp32 to fewer bits: unbiased, cheap, the same on any number of ranks.

A number x between its neighbours a < b of the coarser format becomes b with probability
(x - a) / (b - a), so that the expectation is x and small updates are not lost. Done on the
bits: add a uniform integer to the bits that will be dropped, then drop them. What this is done
to is the number's size; for a negative number all bits of the integer are flipped first.

Noise of column j of label l at one step, with ^ the exclusive or:

    noise[l, j] = base[STRIDE * (l % PERIOD) + j] ^ offset[l]

    base    drawn from (seed, step, stream)
    offset  a hash of (seed, step, stream, l): it does not matter who owns the label

A bit drawn for each weight would take a fifth of the time of the matmuls; this costs 65,536
draws and n hashes a step, and one pass. Each noise is uniform, and any two are independent:
of one label through base, of two labels through offset, of two steps or streams through both.
So errors are unbiased and uncorrelated, and every sum of them has the variance that it would
have with independent noise. Dependence begins with four: two labels that share a base (those
a multiple of PERIOD apart, or closer ones at columns shifted by STRIDE) have error patterns
alike up to a random sign for each bit, and so do two columns. One base row for all labels
would make the errors of a step nearly a matrix of rank one; with shifted ones no two near
labels agree in any column.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.device import upload
from renee_ray.xfc.weights.scratch import Scratch

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn."""
_E4M3_MIN_EXPONENT = 121 << 23
"""fp32 bits of 2**-6, the smallest normal e4m3: below it the spacing stays 2**-9."""
_EXPONENT = 0x7F800000


STRIDE, PERIOD = 16, 4096


class Noise:
    """Uniform integers in [0, 2**bits) for the weights of one shard at one step.

    Args:
        stream: number of the tensor that is rounded, so that two of them get other noise.
        bits: at most 24.
        dim: D, columns; first: global id of local row 0.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        stream: int,
        bits: int,
        dim: int,
        first: int,
        scratch: Scratch,
    ) -> None:
        size = STRIDE * PERIOD + dim
        # Whole words, cut afterwards, take a fifth of the time of integers below a bound.
        words = np.random.PCG64([seed, step, stream]).random_raw(1 + -(-size // 2))
        self.key = int(words[:1].view(np.int64)[0])
        pool = (words[1:].view(np.uint32)[:size] >> np.uint32(32 - bits)).view(np.int32)
        self.base = upload(torch.from_numpy(pool), scratch.device)
        self._dim, self.bits, self.first, self._scratch = dim, bits, first, scratch

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns int32 [stop - start, D] for local rows [start, stop), in reused memory."""
        out = self._scratch("noise", stop - start, self._dim, dtype=torch.int32)
        offset = self._offsets(start, stop)[:, None]
        done = 0
        while done < stop - start:
            phase = (self.first + start + done) % PERIOD
            piece = slice(done, min(done + PERIOD - phase, stop - start))
            shape = (piece.stop - done, self._dim)
            base = self.base.as_strided(shape, (STRIDE, 1), STRIDE * phase)
            torch.bitwise_xor(base, offset[piece], out=out[piece])
            done = piece.stop
        return out

    def _offsets(self, start: int, stop: int) -> Tensor:
        """Returns int32 [stop - start], a hash of each label."""
        size = stop - start
        x = self._scratch("label hash", size, dtype=torch.int64)
        shifted = self._scratch("label hash shifted", size, dtype=torch.int64)
        torch.arange(self.first + start, self.first + stop, out=x)
        mix_bits(x, self.key, shifted)
        # The upper bits of a product depend on all bits of its factors.
        x.bitwise_right_shift_(64 - self.bits).bitwise_and_(2**self.bits - 1)
        return self._scratch("label offset", size, dtype=torch.int32).copy_(x)


def _odd(seed: int) -> int:
    """Returns a fixed odd 64-bit multiplier, as a signed number."""
    return int(np.random.default_rng(seed).integers(-(2**63), 2**63, dtype=np.int64)) | 1


FACTORS = tuple(_odd(seed) for seed in (11, 12, 13))


def mix_bits(x: Tensor, key: int, shifted: Tensor) -> None:
    """Hashes int64 `x` in place, by multiplications and shifts; `shifted` is overwritten."""
    for factor in FACTORS:
        # torch shifts signs in: without the mask the upper half would lose its first bit.
        torch.bitwise_right_shift(x, 32, out=shifted).bitwise_and_(0xFFFFFFFF)
        x.bitwise_xor_(shifted).add_(key).mul_(factor)


BF16_DROPPED = 16
E4M3_DROPPED = 19


def round_to_bf16(values: Tensor, noise: Tensor, scratch: Scratch) -> None:
    """Rounds fp32 `values` in place to numbers of bf16.

    Args:
        noise: int32 of `BF16_DROPPED` bits; is overwritten.
    """
    _flip_below_zero(values, noise, BF16_DROPPED, scratch)
    bits = values.view(torch.int32)
    bits.add_(noise).bitwise_and_(-1 << BF16_DROPPED)


def round_to_e4m3(values: Tensor, noise: Tensor, scratch: Scratch) -> None:
    """Rounds fp32 `values` in place to numbers of e4m3, beyond +-448 to +-448.

    With e = max(2**floor(log2 |x|), 2**-6) the spacing of e4m3 at x is e / 8, subnormals
    included, and |x| + 2 e lies in [2 e, 4 e): one binade, where that spacing is that of
    the four leading bits of the mantissa. So 19 bits are rounded away there.

    Args:
        noise: int32 of `E4M3_DROPPED` bits; is overwritten.
    """
    _flip_below_zero(values, noise, E4M3_DROPPED, scratch)
    values.clamp_(-E4M3_MAX, E4M3_MAX)
    power = scratch("e4m3 power", *values.shape)
    torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=power.view(torch.int32))
    power.view(torch.int32).clamp_(min=_E4M3_MIN_EXPONENT)
    shifted = torch.abs(values, out=scratch("e4m3 shifted", *values.shape)).add_(power, alpha=2)
    shifted.view(torch.int32).add_(noise).bitwise_and_(-1 << E4M3_DROPPED)
    torch.copysign(shifted.sub_(power, alpha=2), values, out=values)


def _flip_below_zero(values: Tensor, noise: Tensor, bits: int, scratch: Scratch) -> None:
    """Flips all bits of the noise of negative values.

    Sign and size are stored apart, so what is rounded is the size. Flipped, more noise means a
    greater number for values of either sign: the rounded number is floor(value + noise), in units
    of the spacing and up to its last bit, as if numbers were stored in two's complement.
    """
    sign = scratch("noise sign", *values.shape, dtype=torch.int32)
    torch.bitwise_right_shift(values.view(torch.int32), 31, out=sign)
    noise.bitwise_xor_(sign.bitwise_and_(2**bits - 1))


def scaled_e4m3(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (codes float8_e4m3fn [B, D], scales float32 [B]); row i is scales[i] * codes[i].

    Numbers go to the nearest code, after each row's largest was brought to the largest of e4m3.
    Those below 2**-14 of that have fewer than the four binary digits of the others.
    """
    # A row of zeros stays one: the scale is no divisor by zero.
    scales = values.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny * E4M3_MAX)
    scales /= E4M3_MAX
    return (values / scales[:, None]).to(torch.float8_e4m3fn), scales
