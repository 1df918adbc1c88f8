"""What one phase of a step takes: seconds by what they are spent on, FLOPs, and bytes by collective and link."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_dlm.planning.hardware import Link


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase, as the rank that it waits for has it.

    Attributes:
        parts: seconds by cause; their sum is what the phase takes. `bubble` is time in which a pipeline stage waits.
        flops: of a rank, on average over ranks; what is computed again counts.
        sent: bytes that a rank sends, by (collective, 'node' or 'network').
        facts: other numbers worth telling.
    """

    parts: Mapping[str, float]
    flops: float = 0.0
    sent: Mapping[tuple[str, str], float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(self.parts, key=self.parts.__getitem__, default="nothing")

    @property
    def bytes(self) -> float:
        return sum(self.sent.values())


class Tally:
    """Adds up a phase.

    tally = Tally(); tally.add("products", seconds); tally.send("tensor", link, bytes, messages); tally.phase()
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.sent: dict[tuple[str, str], float] = defaultdict(float)
        self.flops = 0.0

    def add(self, part: str, seconds: float) -> None:
        self.parts[part] += seconds

    def send(self, collective: str, link: Link, sent: float, messages: float, exposed: float | None = None) -> None:
        """A collective. Args: exposed: the seconds of it that nothing hides; all where it is None."""
        if sent:
            self.sent[collective, link.name] += sent
            self.parts[collective] += link.seconds(sent, messages) if exposed is None else exposed

    def times(self, number: float) -> Tally:
        """The same so many times."""
        result = Tally()
        result.parts.update({name: value * number for name, value in self.parts.items()})
        result.sent.update({name: value * number for name, value in self.sent.items()})
        result.flops = self.flops * number
        return result

    def plus(self, other: Tally) -> Tally:
        result = self.times(1)
        for name, value in other.parts.items():
            result.parts[name] += value
        for name, value in other.sent.items():
            result.sent[name] += value
        result.flops += other.flops
        return result

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def phase(self, **facts: float) -> Phase:
        return Phase(dict(self.parts), self.flops, dict(self.sent), facts)
