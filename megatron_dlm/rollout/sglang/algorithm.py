"""The denoising step as SGLang's dLLM algorithms have it: one forward pass and one step per round of its scheduler.

Built when SGLang is there to subclass from; nothing of this package imports it otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.rollout.sglang.denoise import BlockState, denoise
from megatron_dlm.rollout.sglang.wire import Rules

NAME = "MegatronDLM"


def make_algorithm() -> type:
    """The subclass of SGLang's DllmAlgorithm."""
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    class MegatronDLM(DllmAlgorithm):
        """Keyed draws from the policy, with the step map and the log-probabilities kept for the trace.

        Its settings are `vocabulary_size` and `mask_id`; all else comes with each request.
        """

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if not self.fdfo:
                raise RuntimeError(f"{NAME} works with --dllm-fdfo only, where a request keeps its own state")
            self.vocabulary = Vocabulary(int(config.algorithm_config["vocabulary_size"]), int(config.mask_id))
            self._states: list[BlockState | None] = []

        def step(self, forward_batch: Any, full_logits: Tensor, states: list[BlockState | None]) -> list[bool]:
            ids = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
            masked = ids == self.mask_id
            if forward_batch.dllm_prompt_mask is not None:  # a mask token that the prompt itself holds
                masked &= ~forward_batch.dllm_prompt_mask
            self._states = states
            return denoise(ids, masked, full_logits, states, self.vocabulary)

        def _run_fdfo(self, model_runner: Any, forward_batch: Any, algo_states: list[Any] | None) -> tuple:
            """The base class forgets the states of finished blocks; their record is still to be taken."""
            out = list(super()._run_fdfo(model_runner, forward_batch, algo_states))
            out[3] = list(self._states)
            return tuple(out)

    return MegatronDLM


def state_of(request: Any, block_size: int) -> BlockState | None:
    """The state that a request brings into a round: that of its unfinished block, or a fresh one.

    Args:
        request: SGLang's `Req`. None is returned for one that this package did not submit.
    """
    if request.dllm_incomplete_ids and isinstance(request.dllm_algo_state, BlockState):
        return request.dllm_algo_state
    values = request.sampling_params.custom_params
    if not isinstance(values, dict) or "stream" not in values:
        return None
    rules = Rules.from_wire(values)
    taken = getattr(request, "megatron_dlm_taken", rules.taken)
    return BlockState(rules, int(request.dllm_block_offset), taken, block_size)
