"""The rollout engine as a trainer sees it.

Built once, refitted after each update, shared by training rollouts and evaluation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.config.parallel import with_local_layers, without_recompute
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.model.block_diffusion import BlockDiffusionModel
from megatron_dlm.model.fp8 import Rounding, hold_in_fp8
from megatron_dlm.model.shape import model_shape, transformer_config
from megatron_dlm.parallel.groups import Groups, rollout_groups
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.fp8_self_test import working_rounding
from megatron_dlm.rollout.refit import Refit, RefitReport
from megatron_dlm.rollout.sglang.client import SGLangEngine
from megatron_dlm.rollout.sglang.opening import open_sglang
from megatron_dlm.rollout.sglang.weights import SGLangRefit
from megatron_dlm.rollout.sizing import engine_options
from megatron_dlm.training.setup import Session
from megatron_dlm.training.sleep import state_to_come
from megatron_dlm.training.state import TrainState


@dataclass(slots=True)
class RolloutRig:
    """An engine in its layout.

    Attributes:
        state: whose weights the engine uses.
        engine: this replica's.
        groups: the rollout layout.
        transfer: carries weights to the engine, or lets it read the training parameters themselves.
        block_size: the model's attention block, used where no decoding block is configured.
        stop_token_ids: what ends a response unless configured otherwise.
    """

    state: TrainState
    engine: Engine | SGLangEngine
    groups: Groups
    transfer: Refit | SGLangRefit
    block_size: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def open(
        cls,
        session: Session,
        state: TrainState,
        rollout: RolloutConfig,
        longest_prompt: int,
        longest_response: int,
        spoken_for: int = 0,
    ) -> RolloutRig:
        """Build the engine for a state and give it the weights. Collective.

        Args:
            longest_prompt, longest_response: tokens; the cache has room for both in each sequence.
            spoken_for: bytes of free device memory that are not the cache's, beside those that the state's own
                optimizer is still to take: what the optimizers of other models are.
        """
        if rollout.rollout_backend == "sglang":
            groups = rollout_groups(session.groups, rollout.rollout_tensor_model_parallel_size, 1)
            engine, transfer = open_sglang(session, state, groups, rollout, longest_prompt + longest_response)
            rig = cls(state, engine, groups, transfer, session.model.block_size, (session.tokenizer.eos_id,))
            rig.refit()
            return rig
        groups = rollout_groups(
            session.groups, rollout.rollout_tensor_model_parallel_size, rollout.rollout_expert_model_parallel_size
        )
        in_fp8 = rollout.rollout_weights == "fp8"
        model = rollout_model(session, groups, in_fp8, working_rounding() if in_fp8 else None)
        transfer = Refit(state, model, rollout.refit_bucket_mib * 2**20, rollout.verify_refit)
        full = bool(session.model.full_attention)
        block = 1 if full else rollout.rollout_block_size or session.model.block_size
        longest = -(-(longest_prompt + longest_response) // block) * block
        options = engine_options(
            rollout, groups, longest, full, state_to_come(state) + spoken_for, model.config.params_dtype
        )
        engine = Engine(model, session.vocabulary, options)
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

    def refit(self) -> RefitReport:
        """Show the engine the weights as they are now, under the next version. Collective; with an idle engine.

        The first version of a rig is 1; a trainer that resumes a run sets the one that the run had come to.

        Raises:
            TrainingError: --verify-refit found weights that are not as trained.
        """
        report = self.transfer.run()
        self.engine.drop_cache()  # keys that older weights wrote
        self.engine.weight_version += 1
        return report

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
            confidence=rollout.confidence,
            entropy_bound=rollout.entropy_bound,
            stop_token_ids=self.stop_token_ids if rollout.stop_token_ids is None else tuple(rollout.stop_token_ids),
            prefix_cache=rollout.prefix_cache,
            horizon=rollout.horizon,
        )


def rollout_model(
    session: Session, groups: Groups, in_fp8: bool = False, by: Rounding | None = None
) -> BlockDiffusionModel:
    """A model in the rollout layout, on the meta device: refit gives it the training parameters, or storage.

    Args:
        in_fp8: whether its layers keep their weights in FP8 (model/fp8.py).
        by: what rounds their activations then, if not `fp8.rounding()`.
    """
    with_experts = session.model.num_experts is not None
    parallel = dataclasses.replace(
        with_local_layers(without_recompute(session.parallel)),
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=1,
        num_virtual_stages_per_pipeline_rank=None,
        context_parallel_size=1,
        expert_model_parallel_size=groups.ep_size,
        expert_tensor_parallel_size=groups.pg_collection.expt_tp.size() if with_experts else None,
        sequence_parallel=False,
    )
    config = transformer_config(session.model, parallel, use_cpu_initialization=True, perform_initialization=False)
    with platform.cuda_calls_on_cpu(), torch.device("meta"):
        model = BlockDiffusionModel(config, model_shape(session.model), groups.pg_collection)
        if in_fp8:
            hold_in_fp8(model, by)
    return model.requires_grad_(False).eval()
