"""The rollout engine as a trainer sees it: built once, refitted after each update, shared by training rollouts and evaluation."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.refit import Refit


@dataclass(slots=True)
class RolloutRig:
    """An engine in its layout.

    Attributes:
        engine: this replica's.
        groups: the rollout layout.
        transfer: carries weights to the engine; None where it reads the training parameters themselves.
        block_size: the model's attention block, used where no decoding block is configured.
        stop_token_ids: what ends a response unless configured otherwise.
    """

    engine: Engine
    groups: Groups
    transfer: Refit | None
    block_size: int
    stop_token_ids: tuple[int, ...]

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
        """Show the engine the weights as they are now, under a new version. Collective."""
        if self.transfer is not None:
            self.transfer.run()
        self.engine.weight_version += 1

    def sampling(self, rollout: RolloutConfig) -> SamplingParams:
        """Sampling parameters of training rollouts."""
        block = rollout.rollout_block_size or self.block_size
        return SamplingParams(
            temperature=rollout.rollout_temperature, top_k=rollout.rollout_top_k, top_p=rollout.rollout_top_p,
            max_new_tokens=rollout.rollout_max_response_len, block_size=block, denoising_steps=rollout.denoising_steps or block,
            remasking=rollout.remasking, threshold=rollout.threshold, stop_token_ids=stop_tokens(rollout.stop_token_ids, self.stop_token_ids),
        )


def stop_tokens(configured: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(default if configured is None else configured)
