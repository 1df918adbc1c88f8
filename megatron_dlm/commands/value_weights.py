"""Where a value model's weights come from, and where they go: a folder of its own within the policy's checkpoints.

    SAVE/iter_0000010/            the policy; says which value model belongs to it
    SAVE/value/iter_0000010/      that value model

The value model is written first and deleted last, and both carry one name for the pair, drawn anew at each save. So a
policy's checkpoint that can be read has its value model, and two that do not belong together are not taken for a pair.
"""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import Any

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.config.model import ModelConfig

FOLDER = "value"
PAIR = "value_pair"  # beside both models' weights


def save(value_state, policy_state, checkpoint: CheckpointConfig, step: int, model: ModelConfig) -> dict[str, Any]:
    """Write the value model's checkpoint of a step. Collective.

    Where the two take turns in device memory (one of them sleeps) they do so here: the policy sleeps while the value
    model's optimizer is written, and the value model afterwards.

    Returns:
        What has to be stored beside the policy's weights, so that the two find each other.
    """
    from megatron_dlm.checkpoint import distributed, fit
    from megatron_dlm.parallel.exchange import broadcast_object
    from megatron_dlm.training.sleep import asleep, sleep

    pair = {PAIR: broadcast_object(uuid.uuid4().hex, src=0)}
    take_turns = asleep(policy_state) or asleep(value_state)
    if take_turns:
        sleep(policy_state)
    distributed.save(
        value_state,
        Path(checkpoint.save) / FOLDER,
        step,
        {fit.VALUE_MODEL: True, "model": dataclasses.asdict(model), **pair},
        with_optimizer=not checkpoint.no_save_optim,
    )
    if take_turns:
        sleep(value_state)
    return pair


def restore_value(
    value_state,
    policy_state,
    checkpoint: CheckpointConfig,
    value_load: str | None,
    model: ModelConfig,
    restored: dict[str, Any],
) -> str:
    """Give a new value model its weights: those of the run that is resumed, or of --value-load, or the policy's
    backbone. Collective.

    Args:
        policy_state: with its weights. restored: what `weights.restore` returned.

    Returns:
        A sentence about where they are from.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, it is not a value model, or not of this policy.
    """
    from megatron_dlm.checkpoint import distributed, fit, places
    from megatron_dlm.commands.common import together
    from megatron_dlm.training.backbone import copy_backbone

    def check(saved: dict[str, Any]) -> None:
        fit.check_kind(saved, True, source)
        fit.check_same_model(saved, model, source, finetune=PAIR not in restored)
        if saved.get(PAIR) != restored.get(PAIR, saved.get(PAIR)):
            raise CheckpointError(
                f"The value model in {folder} and the policy in --load {checkpoint.load} were not saved together. "
                "Choose another iteration with --ckpt-step, or start anew with --finetune and --value-load."
            )

    if PAIR in restored:
        folder = Path(checkpoint.load) / FOLDER
        source = f"--load {folder}"
        iteration = int(together(lambda: places.find(checkpoint.load, checkpoint.ckpt_step)).name.removeprefix("iter_"))
        distributed.load(value_state, folder, iteration, with_optimizer=not checkpoint.no_load_optim, check=check)
        return f"The value model goes on from iteration {iteration} of {folder}"
    copy_backbone(policy_state, value_state)
    if value_load is None:
        return "The value model begins with the policy's backbone and expects nothing"
    folder = Path(value_load) / FOLDER if (Path(value_load) / FOLDER).is_dir() else Path(value_load)
    source = f"--value-load {value_load}"
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}. Give --value-load that of a value model.")
    distributed.load(value_state, folder, with_optimizer=False, check=check, flag="--value-load")
    value_state.iteration = 0
    return f"The value model begins with the weights of {folder}"
