"""`whole_model` against what megatron-core itself would store."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.parallel import ParallelConfig
from tests.checkpoint.hf.test_spans import models
from tests.tiny import one_process


@pytest.mark.parametrize("name, config", models())
def test_the_whole_model_is_what_megatron_core_stores(name: str, config) -> None:
    groups = one_process()
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_dlm.checkpoint.hf.stored import place_of, shard_of, whole_model
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config

    megatron = transformer_config(config, ParallelConfig(), use_cpu_initialization=True, perform_initialization=False)
    with platform.cuda_calls_on_cpu(), torch.device("meta"):
        model = BlockDiffusionModel(megatron, model_shape(config), groups.pg_collection)
    found = {}
    for value in nested_values(model.sharded_state_dict(metadata={"dp_cp_group": groups.pg_collection.dp_cp})):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                stored, offset = place_of(part)
                found.setdefault(stored, []).append((part, offset))
    expected = whole_model(config)
    assert set(found) == set(expected) and len(expected) == len(set(expected))
    for stored, parts in found.items():
        ours = shard_of(stored, torch.empty(stored.shape, device="meta"), config)
        for part, _ in parts:
            assert (ours.key, ours.global_shape, ours.prepend_axis_num, ours.allow_shape_mismatch) == (
                part.key,
                part.global_shape,
                part.prepend_axis_num,
                part.allow_shape_mismatch,
            )
        assert sum(part.data.numel() for part, _ in parts) == torch.Size(stored.shape).numel()
