"""Every random draw has a key.

A draw is a pure function of what it is for: (seed, purpose, step, item, sample) name a stream, and counters such as
(position, denoising step) name a draw inside it. Rank, batch composition and call order never enter, so results do not
depend on layout and a run resumes exactly.

Streams are hashed with BLAKE2b on the host; counters with the SplitMix64 finaliser in int64 tensor arithmetic, which
wraps the same way on every device.

Orders are of two kinds: `permutation` writes one out, `shuffled` gives single places of one that nobody writes out, for
as many items as a cluster reads.
"""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor

_WRAP = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that neighbouring counters land far apart
_ROUNDS = 8  # of the Feistel network


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= _WRAP
    return value - _WRAP if value >= 1 << 63 else value


def stream(seed: int, purpose: str, *parts: int | str) -> int:
    """Name of a stream of draws, as an int64.

    Args:
        seed: the run's seed.
        purpose: what is drawn ('sft-mask', 'rollout', ...); two purposes never share draws.
        parts: step, item, sample, ...; integers of any kind (3 and np.int64(3) are one part) or strings.

    Raises:
        TypeError: a part is neither.
    """
    text = "\x1f".join(
        f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in (seed, purpose, *parts)
    )
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser (Steele et al., OOPSLA 2014)."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def uniforms(streams: int | Tensor, *counters: Tensor) -> Tensor:
    """One uniform number in [0, 1) per counter.

    Args:
        streams: one stream, or an int64 tensor of them that broadcasts with the counters.
        counters: integer tensors that broadcast together, for example position and denoising step.

    Returns:
        float64 tensor of the broadcast shape; 53 random bits each.
    """
    device = counters[0].device
    x = _mix(torch.as_tensor(streams, dtype=torch.int64, device=device))
    for counter in counters:
        x = _mix(x + (counter.to(torch.int64) + 1) * _signed(_GOLDEN))
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def permutation(stream_: int, n: int) -> Tensor:
    """A permutation of range(n), int64 [n], that depends on the stream and n alone."""
    return torch.argsort(uniforms(stream_, torch.arange(n)), stable=True)


def shuffled(stream_: int, n: int, places: Tensor) -> Tensor:
    """What stands at some places of a permutation of range(n) that depends on the stream and n alone.

    Costs time and memory for these places only, whatever n is: a Feistel network (Luby and Rackoff, 1988) permutes the
    numbers of an even number of bits, at most 4 n of them, and is applied again to those that it takes out of range(n).

    Args:
        places: int64 [P], each in range(n).

    Returns:
        int64 [P].
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    names = [_mix(torch.tensor(_signed(stream_ + number * _GOLDEN))) for number in range(1, _ROUNDS + 1)]
    found = places.to(torch.int64).clone()
    outside = torch.ones_like(found, dtype=torch.bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & low
        for name in names:
            left, right = right, left ^ _shift_right(_mix(name + (right + 1) * _signed(_GOLDEN)), 64 - half)
        found[outside] = (left << half) | right
        outside = found >= n
    return found
