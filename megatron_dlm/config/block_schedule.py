"""Which block size a model is trained in at which step.

A schedule is written as '1:200 4:200 32': 200 steps in blocks of 1, 200 in blocks of 4, then blocks of 32 to the end
of the run. An autoregressive model becomes one of block diffusion more gently so (LLaDA2.0, arXiv 2512.15745; NBDiff,
arXiv 2512.06776), and small blocks grow large ones. 'full' is one block for the whole sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_dlm.config.errors import ConfigError

FULL = "full"


@dataclass(frozen=True, slots=True)
class BlockSchedule:
    """Attributes: sizes: one after the other; None is full attention. starts: first step of each but the first."""

    sizes: tuple[int | None, ...]
    starts: tuple[int, ...] = ()

    def at(self, step: int) -> int | None:
        """Block size of the update after `step` others."""
        return self.sizes[bisect_right(self.starts, step)]

    @classmethod
    def read(cls, stages: Sequence[str] | None, final: int | None) -> BlockSchedule:
        """The schedule that --block-size-schedule describes.

        Args:
            stages: as the user wrote them; None for a single size.
            final: block size of the model.

        Raises:
            ConfigError: they make no schedule, or end in another size than the model's.
        """
        if stages is None:
            return cls((final,))
        sizes, steps = zip(*(_stage(text, last=n == len(stages) - 1) for n, text in enumerate(stages)))
        if sizes[-1] != final:
            raise ConfigError(
                f"--block-size-schedule {' '.join(stages)} ends in blocks of {sizes[-1] or FULL}, and the model's are "
                f"of {final or FULL}. Use a last size that is the model's (--block-size)."
            )
        return cls(sizes, tuple(accumulate(steps[:-1])))


def _stage(text: str, last: bool) -> tuple[int | None, int]:
    size, colon, steps = text.partition(":")
    good = (size == FULL or _positive(size)) and (not colon if last else _positive(steps))
    if not good:
        form = "a size alone, which holds to the end" if last else "SIZE:STEPS"
        raise ConfigError(
            f"--block-size-schedule has {text!r} where {form} is expected. Write it like this: 1:200 4:200 32."
        )
    return None if size == FULL else int(size), 0 if last else int(steps)


def _positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
