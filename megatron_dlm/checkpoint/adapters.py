"""Low-rank adapters in checkpoints: a model with them and a checkpoint without, or the other way round.

    model      checkpoint    what is read
    plain      plain         as it is
    adapters   plain         the weights; the adapters stay new
    adapters   the same      weights and adapters
    adapters   others        refused
    plain      adapters      both, and the adapters are merged into the weights

An optimizer's state is read only where the two are alike, for it is that of the adapters alone.

What is stored beside the weights says which adapters there are (`LORA`), because their alpha cannot be seen in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_dlm.checkpoint.hf.spans import Stored
from megatron_dlm.checkpoint.hf.stored import StoredReader
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model import lora
from megatron_dlm.training.state import TrainState

LORA = "lora"
"""Name, beside the weights, of `LoraConfig.stored()`; absent where there are no adapters."""


def adapters_of(state: TrainState) -> dict[str, Any] | None:
    """What a checkpoint of this state says of its adapters; the same on all ranks."""
    wanted = getattr(state.module, "adapters", None)
    return None if wanted is None else wanted.stored()


def check_adapters(
    there: dict[str, Any] | None, here: dict[str, Any] | None, source: str, with_optimizer: bool
) -> None:
    """Refuse adapters that do not fit.

    Args:
        there, here: what is said of those in the checkpoint and of those of this run.
        source: names the checkpoint. with_optimizer: whether its optimizer state is wanted, too.

    Raises:
        CheckpointError: they do not.
    """
    if there == here or (not with_optimizer and (there is None or here is None)):
        return
    if with_optimizer and (there is None or here is None):
        said = [_described(one) for one in (there, here)]
        raise CheckpointError(
            f"{source} was trained with {said[0]}, and this run has {said[1]}. Use the same to resume it, or start "
            "from its weights with --finetune."
        )
    raise CheckpointError(
        f"{source} has {_described(there)}, and this run {_described(here)}. Use the same, or merge those of the "
        "checkpoint first (convert merge-lora)."
    )


def _described(stored: dict[str, Any] | None) -> str:
    if stored is None:
        return "no adapters"
    return (
        f"--lora-rank {stored['rank']} --lora-alpha {stored['alpha']:g} --lora-target-modules "
        f"{' '.join(stored['targets'])}"
    )


@contextmanager
def merged_afterwards(state: TrainState, there: dict[str, Any] | None) -> Iterator[None]:
    """Within it a model can be filled from a checkpoint: a plain one has the checkpoint's adapters, and takes them
    into its weights at the end.
    """
    added = there is not None and adapters_of(state) is None
    chunks = state.unwrapped_chunks() if added else []
    for chunk in chunks:
        lora.attach(chunk, LoraConfig.of(there), seed=0)
    try:
        yield
        for chunk in chunks:
            lora.merge_into_weights(chunk)
    finally:
        for chunk in chunks:
            lora.detach(chunk)


def is_new(name: str, there: dict[str, Any] | None) -> bool:
    """Whether a tensor of a model is an adapter's, and the checkpoint has none."""
    return there is None and lora.OF_ADAPTERS in name


class MergedReader(StoredReader):
    """Reads a checkpoint with adapters as if they had been merged into its weights."""

    def __init__(self, folder: Path, model: ModelConfig, stored: dict[str, Any]) -> None:
        super().__init__(folder, model)
        self.lora = LoraConfig.of(stored)
        self._inputs: tuple[Stored, Tensor] | None = None  # A of the layer whose rows were asked for last

    def read(self, stored: Stored, start: int, count: int) -> Tensor:
        weight = super().read(stored, start, count)
        layer, _, kind = stored.key.rpartition(".")
        if kind != "weight" or ".experts." in layer or layer.rpartition(".")[2] not in self.lora.lora_target_modules:
            return weight
        rank, (outputs, inputs) = self.lora.lora_rank, stored.shape
        first = Stored(f"{layer}.lora.a", stored.layer, None, (rank, inputs))
        second = Stored(f"{layer}.lora.b", stored.layer, None, (outputs, rank))
        if self._inputs is None or self._inputs[0] != first:
            self._inputs = (first, super().read(first, 0, rank))
        return lora.merge(weight, self._inputs[1], super().read(second, start, count), self.lora.scale)


def reader_of(folder: Path, model: ModelConfig, extra: dict[str, Any]) -> StoredReader:
    """What reads the weights of a checkpoint, adapters merged.

    Args:
        extra: what was stored beside them.
    """
    stored = extra.get(LORA)
    return StoredReader(folder, model) if stored is None else MergedReader(folder, model, stored)
