"""A family: how its config.json is read and written, and how its tensors lie in ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dlm.checkpoint.hf.spans import Recipe
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class HFConfig:
    """A config.json. `where` names it in messages."""

    content: Mapping[str, Any]
    where: str

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null."""
        return next((self.content[name] for name in names if self.content.get(name) is not None), default)

    def need(self, *names: str) -> Any:
        """Raises CheckpointError when none of these fields is there."""
        value = self.get(*names)
        if value is None:
            raise CheckpointError(f"{self.where} has no {' or '.join(names)}. Give the config.json of the checkpoint.")
        return value

    def rotary_base(self, default: float) -> float:
        """theta: at the top level, or where newer releases of transformers put it."""
        return float(self.get("rope_theta", default=self._rope().get("rope_theta", default)))

    def _rope(self) -> Mapping[str, Any]:
        return self.get("rope_parameters", "rope_scaling", default={})

    def refuse(self, **unexpected: tuple[Any, ...]) -> None:
        """Refuse fields whose value is none of those that our layers follow; absent ones pass.

        Raises:
            CheckpointError: there is one.
        """
        for name, allowed in unexpected.items():
            value = self.content.get(name)
            if value is not None and value not in allowed:
                raise CheckpointError(
                    f"{self.where} has {name} {value!r}, which the layers of this package do not follow (only "
                    f"{' or '.join(map(repr, allowed))}). Give another checkpoint."
                )

    def refuse_scaled_rope(self) -> None:
        kind = self._rope().get("rope_type", self._rope().get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{self.where} scales its rotary positions ({kind}), which this package does not. Give another one."
            )


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of checkpoint.

    Attributes:
        name: for messages and flags.
        architecture: in config.json; that of an export.
        table: key of a stored tensor -> where it comes from.
        read: fields of ModelConfig from a config.json; refuses what our layers do not follow.
        write: fields of config.json that a model decides; an export keeps all others of its source.
        mask_id: of the mask token where config.json names none; None where the tokenizer says.
        with_blocks: name of the family that a model of this one belongs to once its block size is not 1 and it predicts
            tokens in their own place.
        ignored: endings of tensor names that carry nothing to import.
    """

    name: str
    architecture: str
    table: Mapping[str, Recipe]
    read: Callable[[HFConfig], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    mask_id: int | None = None
    with_blocks: str | None = None
    ignored: tuple[str, ...] = field(default=("rotary_emb.inv_freq",))
