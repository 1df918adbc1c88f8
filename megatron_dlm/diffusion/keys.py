"""Every random draw has a key.

A draw is a pure function of what it is for: (seed, purpose, step, item, sample) name a stream, and counters such as
(position, denoising step) name a draw inside it. Rank, batch composition and call order never enter, so results do not
depend on layout and a run resumes exactly.

Streams are hashed with BLAKE2b on the host; counters with the SplitMix64 finaliser in int64 tensor arithmetic, which
wraps the same way on every device.
"""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor

_WRAP = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that neighbouring counters land far apart


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
