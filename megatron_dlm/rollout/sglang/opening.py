"""Put together, from a session, what the trainer needs of SGLang: the child with its devices, the engine, the refit."""

from __future__ import annotations

import dataclasses
import socket

import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.rollout.sglang.check import check_model, dtype_name, model_config
from megatron_dlm.rollout.sglang.client import Room, SGLangEngine, visible_devices
from megatron_dlm.rollout.sglang.process import Child, ChildSettings, server_command
from megatron_dlm.rollout.sglang.weights import SGLangRefit, SharedBuffer
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState

_SLACK = 8  # positions that SGLang keeps free behind a prompt, besides a block


def open_sglang(
    session: Session, state: TrainState, groups: Groups, rollout: EngineConfig, longest: int
) -> tuple[SGLangEngine, SGLangRefit]:
    """The engine, still with random weights, and what carries the weights to it. Collective.

    Args:
        groups: the rollout layout; one child for each of its replicas.
        longest: tokens of the longest prompt and the longest response together.

    Raises:
        ConfigError, DependencyError: SGLang cannot serve this model here, or does not start.
    """
    block = rollout.rollout_block_size or session.model.block_size
    family = check_model(session.model, block)
    max_length = -(-longest // block) * block  # the terminal block included
    # SGLang refuses texts longer than the model was made for; here that was checked for the run as a whole.
    context = max_length + block + _SLACK
    described = dataclasses.replace(
        session.model, max_position_embeddings=max(session.model.max_position_embeddings, context)
    )
    settings = ChildSettings(
        config=model_config(family, described),
        mask_id=session.vocabulary.mask_id,
        vocabulary_size=session.vocabulary.size,
        block_size=block,
        max_running_requests=rollout.max_running_requests,
        context_length=context,
        dtype=dtype_name(session.model),
        mem_fraction_static=rollout.sglang_mem_fraction_static,
        devices=_devices(groups),
        tensor_parallel_size=groups.tp_size,
    )
    buffer = SharedBuffer()
    inherited = () if buffer.fd is None else (buffer.fd,)
    start = lambda: Child(server_command(rollout.sglang_python), settings, inherited)
    room = Room(max_length, block, _bytes_per_token(session.model), rollout.max_running_requests)
    engine = SGLangEngine(start, room, groups.tp)
    return engine, SGLangRefit(state, engine, session.model, family, buffer, rollout.refit_bucket_mib * 2**20)


def _devices(groups: Groups) -> str | None:
    """CUDA_VISIBLE_DEVICES for this replica's child. Collective over the replica.

    Raises:
        ConfigError: its ranks are on several hosts.
    """
    here = (socket.gethostname(), platform.device().index)
    all_ = [here] if groups.tp_size == 1 else gather_objects(here, groups.tp)
    if len({host for host, _ in all_}) > 1:
        raise ConfigError(
            f"SGLang serves a rollout replica on one host, and the {groups.tp_size} tensor-parallel ranks of one are "
            "on several. Use a smaller rollout tensor-parallel size, or --rollout-backend native."
        )
    return visible_devices([index for _, index in all_]) if platform.is_cuda() else None


def _bytes_per_token(model: ModelConfig) -> int:
    itemsize = torch.bfloat16.itemsize if model.bf16 else torch.float32.itemsize
    return 2 * model.num_layers * model.num_query_groups * model.kv_channels * itemsize
