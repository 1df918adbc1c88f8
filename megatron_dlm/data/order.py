"""An order for as many samples as a cluster reads: nothing is kept of it but the place.

`sampler.EpochSampler` sorts objects by a hash of their content, so that data may change under a run. Data that was
indexed does not change, and 100 million samples are no objects: here the order of an epoch is a permutation of numbers,
of which only the places that are asked for are computed (diffusion/keys.py, `shuffled`).

Invariants (tests/data/test_order.py):
  - what follows a place is a function of (data, seed, place): not of ranks, hosts or batch sizes;
  - each epoch holds every sample once;
  - a place in other data is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.diffusion.keys import shuffled, stream

Item = TypeVar("Item", covariant=True)


class Data(Protocol[Item]):
    """What can be numbered.

    Attributes:
        identity: text that is another one for other data.
    """

    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class KeyedOrder(Generic[Item]):
    """Goes over the data epoch by epoch, each time in another order.

    Args:
        data: at least one sample.
        stage: which data: that of 'sft'.
        saved: what `progress` returned, or an empty mapping.

    Raises:
        ConfigError: the saved place is one in other data.
    """

    def __init__(self, data: Data[Item], seed: int, stage: str, saved: Mapping[str, Any]) -> None:
        place = saved.get("position") or {"epoch": 0, "count": 0, "of": len(data), "data": data.identity}
        if (place.get("of"), place.get("data")) != (len(data), data.identity):
            then = f"{place['of']} samples" if "of" in place else "JSONL files alone"
            raise ConfigError(
                f"--data-path and --seq-length give {len(data)} samples that are not those of the saved run ({then}), "
                "so its place among them is unknown. Give the same data and length, or begin anew with --finetune."
            )
        self._data, self._seed, self._stage = data, seed, stage
        self.epoch: int = place["epoch"]
        self.count: int = place["count"]

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self._data)

    def take(self, count: int) -> list[Item]:
        """The next `count` samples, over the ends of epochs."""
        return [self._data[index] for index in self.indices(count)]

    def indices(self, count: int) -> list[int]:
        """Their numbers; they count as taken."""
        found: list[int] = []
        while len(found) < count:
            if self.count == len(self):
                self.epoch, self.count = self.epoch + 1, 0
            end = min(len(self), self.count + count - len(found))
            name = stream(self._seed, "order", self.epoch, self._data.identity)
            found += shuffled(name, len(self), torch.arange(self.count, end)).tolist()
            self.count = end
        return found

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        place = {"stage": self._stage, "epoch": self.epoch, "count": self.count}
        return {"position": {**place, "of": len(self), "data": self._data.identity}}
