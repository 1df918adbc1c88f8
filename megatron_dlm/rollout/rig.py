"""The rollout engine as a trainer sees it.

Built once, refitted after each update, shared by training rollouts and evaluation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.model.block_diffusion import BlockDiffusionModel
from megatron_dlm.model.shape import model_shape, transformer_config
from megatron_dlm.parallel.groups import Groups, rollout_groups
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.refit import Refit, bind
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState


@dataclass(slots=True)
class RolloutRig:
    """An engine in its layout.

    Attributes:
        state: whose weights the engine uses.
        engine: this replica's.
        groups: the rollout layout.
        transfer: carries weights to the engine; None where it reads the training parameters themselves.
        block_size: the model's attention block, used where no decoding block is configured.
        stop_token_ids: what ends a response unless configured otherwise.
    """

    state: TrainState
    engine: Engine
    groups: Groups
    transfer: Refit | None
    block_size: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def open(
        cls, session: Session, state: TrainState, rollout: RolloutConfig, longest_prompt: int, longest_response: int
    ) -> RolloutRig:
        """Build the engine for a state and give it the weights. Collective.

        Args:
            longest_prompt, longest_response: tokens; the cache has room for both in each sequence.
        """
        groups = rollout_groups(session.groups)
        model, transfer = _rollout_model(session, state, groups)
        block = rollout.rollout_block_size or session.model.block_size
        longest = -(-(longest_prompt + longest_response) // block) * block
        engine = Engine(
            model, session.vocabulary, rollout.max_running_requests, longest, rollout.max_tokens_per_pass
        )
        rig = cls(state, engine, groups, transfer, session.model.block_size, (session.tokenizer.eos_id,))
        rig.refit()
        return rig

    @property
    def replica(self) -> int:
        return self.groups.dp_rank

    @property
    def num_replicas(self) -> int:
        return self.groups.dp_size

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its tensor-parallel group, whose ranks hold the same traces."""
        return self.groups.tp_rank == 0

    def refit(self) -> None:
        """Show the engine the weights as they are now, under the next version. Collective; with an idle engine.

        The first version of a rig is 1; the count starts again when a run is resumed.
        """
        if self.transfer is not None:
            self.transfer.run()
        else:
            self.state.gather_parameters()  # the optimizer may still owe other ranks' shards of what the engine reads
        self.engine.weight_version += 1

    def sampling(self, rollout: RolloutConfig) -> SamplingParams:
        """Sampling parameters of training rollouts."""
        block = rollout.rollout_block_size or self.block_size
        return SamplingParams(
            temperature=rollout.rollout_temperature,
            top_k=rollout.rollout_top_k,
            top_p=rollout.rollout_top_p,
            max_new_tokens=rollout.rollout_max_response_len,
            block_size=block,
            denoising_steps=rollout.denoising_steps or block,
            remasking=rollout.remasking,
            threshold=rollout.threshold,
            stop_token_ids=self.stop_token_ids if rollout.stop_token_ids is None else tuple(rollout.stop_token_ids),
        )


def _rollout_model(session: Session, state: TrainState, groups: Groups) -> tuple[BlockDiffusionModel, Refit | None]:
    """A model in the rollout layout, and what carries weights to it (None: it has the training parameters)."""
    parallel = dataclasses.replace(session.parallel, pipeline_model_parallel_size=1, sequence_parallel=False)
    shared = session.groups.pp_size == 1
    # Bound to the training parameters it needs no memory of its own; a refitted model has memory, but nothing is drawn
    # for it.
    config = transformer_config(session.model, parallel, use_cpu_initialization=shared, perform_initialization=False)
    with platform.cuda_calls_on_cpu(), torch.device("meta" if shared else platform.device()):
        model = BlockDiffusionModel(config, model_shape(session.model), groups.pg_collection)
    model.requires_grad_(False).eval()
    if not shared:
        return model, Refit(state, model)
    bind(state.module, model)
    return model, None
