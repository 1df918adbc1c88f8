"""Several sources of prompts or samples in fixed proportions.

Each source has a sampler of its own, and so a place of its own. Which of them comes next is decided by credit: at each
draw every source earns its weight, the one with most credit is taken and pays what all have earned. So after any number
of draws a source has had its share of them, up to about one item; nothing is drawn by chance.

`Mixture` offers different items, for RL steps, so that it passes over a source that has no more of them; `Blend` takes
turns whatever the sizes, for supervised fine-tuning.

Invariants (tests/data/test_mixture.py):
  - what is offered is a function of sources, weights, seed and progress: not of the order of sources, nor of batch
    sizes (in a `Mixture` as long as no source has fewer items than its part of a batch);
  - a source that is added or taken out changes the place of no other, and one that comes back goes on where it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.data.sampler import Keyed

Item = TypeVar("Item", bound=Keyed)


class Sampler(Protocol[Item]):
    """Whose turn it is."""

    def offer(self, count: int, step: int, at_work: Collection[str]) -> list[Item]:
        """`count` items, and this was their turn.

        Args:
            step: of the run, for draws that are keyed by it.
            at_work: keys that the caller has no use for; they may be offered all the same, where it is their turn.
        """

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""


class Turns:
    """Which source comes next, by credit.

    Args:
        weights: source -> its weight, above 0; only their proportions count.
        saved: what `progress` returned, or an empty mapping.

    Attributes:
        places: what the saved run knew of each source.
    """

    def __init__(self, weights: Mapping[str, float], saved: Mapping[str, Any]) -> None:
        self.places: dict[str, dict[str, Any]] = dict(saved.get("sources", {}))
        then = {name: place["weight"] for name, place in self.places.items() if place["weight"]}
        self.weights = dict(sorted(weights.items()))
        # Credit is counted in units of the weights that earned it: under others it starts anew.
        same = self.weights == then
        self._credit = {name: self.places[name]["credit"] if same else 0.0 for name in self.weights}

    def next(self, able: Iterable[str] | None = None) -> str:
        """The source whose turn it is, of those that are able, or of all."""
        able = list(self.weights if able is None else able)
        for name in able:
            self._credit[name] += self.weights[name]
        first = max(able, key=lambda name: (self._credit[name], self.weights[name], name))
        self._credit[first] -= math.fsum(self.weights[name] for name in able)
        return first

    def progress(self, places: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it.

        Args:
            places: what each source says of its own place.
        """
        absent = {
            name: {**place, "weight": None, "credit": 0.0}
            for name, place in self.places.items()
            if name not in self.weights
        }
        present = {
            name: {"weight": weight, "credit": self._credit[name], **places[name]}
            for name, weight in self.weights.items()
        }
        return {"sources": {**absent, **present}}


class Mixture(Generic[Item]):
    """Offers items of several sources, no two of them at once.

    Args:
        sources: name -> its items, no two with one key.
        weights: of the same names, above 0; only their proportions count.
        open_: (items, progress of a source or an empty mapping) -> its sampler.
        saved: what `progress` returned, or an empty mapping.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Item]],
        weights: Mapping[str, float],
        open_: Callable[[Sequence[Item], Mapping[str, Any]], Sampler[Item]],
        saved: Mapping[str, Any],
    ) -> None:
        self._turns = Turns(weights, saved)
        names = self._turns.weights
        self._samplers = {name: open_(sources[name], self._turns.places.get(name, {})) for name in names}
        self._sizes = {name: len(sources[name]) for name in names}
        self._source_of = {item.key: name for name in names for item in sources[name]}

    def offer(self, count: int, step: int, at_work: Collection[str]) -> list[Item]:
        """Items of all sources in turn, of each at most as many as are not at work: then it is passed over, and earns
        nothing. Fewer than `count` where all sources together have no more.
        """
        busy = Counter(self._source_of[key] for key in at_work if key in self._source_of)
        free = {name: size - busy[name] for name, size in self._sizes.items()}
        turns: list[str] = []
        for _ in range(count):
            able = [name for name, left in free.items() if left > 0]
            if not able:
                break
            turns.append(self._turns.next(able))
            free[turns[-1]] -= 1
        found = {name: iter(self._samplers[name].offer(times, step, at_work)) for name, times in Counter(turns).items()}
        return [next(found[name]) for name in turns]

    def progress(self) -> dict[str, Any]:
        return self._turns.progress({name: sampler.progress() for name, sampler in self._samplers.items()})


class Endless(Protocol[Item]):
    """A source that goes over its items again and again."""

    def take(self, count: int) -> list[Item]:
        """The next `count` items."""

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""


class Blend(Generic[Item]):
    """Takes items of several sources, of a small one as often as its weight asks for.

    Args:
        weights: of the sources, above 0; only their proportions count.
        open_: (name, progress of a source or an empty mapping) -> its items.
        saved: what `progress` returned, or an empty mapping.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        open_: Callable[[str, Mapping[str, Any]], Endless[Item]],
        saved: Mapping[str, Any],
    ) -> None:
        self._turns = Turns(weights, saved)
        self._sources = {name: open_(name, self._turns.places.get(name, {})) for name in self._turns.weights}

    def take(self, count: int) -> list[Item]:
        """The next `count` items, of all sources in turn."""
        turns = [self._turns.next() for _ in range(count)]
        found = {name: iter(self._sources[name].take(times)) for name, times in Counter(turns).items()}
        return [next(found[name]) for name in turns]

    def progress(self) -> dict[str, Any]:
        return self._turns.progress({name: source.progress() for name, source in self._sources.items()})


def check_mixture(
    sizes: Mapping[str, int], weights: Sequence[float], batch: int, flag: str = "--rollout-batch-size"
) -> None:
    """Refuse proportions that an RL step cannot have, for its prompts are all different.

    Args:
        sizes: source -> its number of prompts, in the order of `weights`.
        batch: prompts that a step asks for at once. flag: that says how many.

    Raises:
        ConfigError: a source has fewer prompts than its share of a step.
    """
    whole = math.fsum(weights)
    for (source, size), weight in zip(sizes.items(), weights, strict=True):
        share = math.ceil(round(batch * weight / whole, 6))
        if size < share:
            raise ConfigError(
                f"--prompt-weights makes {share} of the {batch} prompts of an RL step ({flag}) come from "
                f"{source}, which has {size or 'none'} that can be used. Lower its weight, or give it more prompts."
            )
