"""A job to be planned: the settings of a run, and the sizes of rows that follow from them. Nothing is built here.

What the settings do not say is how long texts are and how many tokens a denoising step unmasks; `Texts` says it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.objective import with_method
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.plan import PlanConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.sft_objective import MASKED, num_masks, with_objective
from megatron_dlm.config.value import optimizer_config
from megatron_dlm.diffusion.context import shared_length
from megatron_dlm.diffusion.planner import row_multiple
from megatron_dlm.planning.attention import Kept, group_lengths
from megatron_dlm.planning.measure import RowShape
from megatron_dlm.planning.precision import Precision


@dataclass(frozen=True, slots=True)
class Texts:
    """Typical lengths in tokens, the longest allowed ones, in how many noisy copies a text is learned, and how often a
    token of a response is predicted in them.
    """

    prompt: int
    response: int
    longest_prompt: int
    longest_response: int
    copies: float
    predicted: float = 1.0

    @property
    def own(self) -> int:
        """Tokens of a row that one response takes besides its prompt."""
        return math.ceil(self.response * (1 + self.copies))

    @property
    def largest(self) -> int:
        """Most tokens that a text with one copy of each block needs, which a row must hold."""
        return self.longest_prompt + 2 * self.longest_response


@dataclass(frozen=True, slots=True)
class Job:
    """A run as `plan` sees it.

    Attributes:
        model: resolved. value_optimizer: of the value model, if there is one. rl, rollout: None for fine-tuning; rl
            with the fields of its method.
        responses: of one update. samples: of them that share a prompt.
        fp8_transposed: of the hardware (planning/hardware.py).
    """

    world_size: int
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    texts: Texts
    row_budget: int
    responses: int
    updates: int
    samples: int
    dense_attention: bool
    rl: RLConfig | None = None
    rollout: RolloutConfig | None = None
    value_optimizer: OptimizerConfig | None = None
    lora: LoraConfig | None = None
    fp8_transposed: bool = True

    @property
    def precision(self) -> Precision:
        """What the trained layers are made of and multiply in."""
        return Precision.of(self.parallel, self.fp8_transposed)

    @property
    def triton_head(self) -> bool:
        """Whether the loss head has kernels: where it is left to the run, as on a GPU that they work on."""
        return self.parallel.loss_head != "torch" and self.parallel.loss_chunk_size > 0 and not self.model.fp64

    @property
    def attention(self) -> str:
        """The backend of training that the plan is for: 'dense' or 'flex'."""
        return "dense" if self.dense_attention else "flex"

    @property
    def has_reference(self) -> bool:
        return self.rl is not None and self.rl.kl_reference == "frozen"

    @property
    def has_teacher(self) -> bool:
        return self.rl is not None and bool(self.rl.distill_coef)

    @property
    def context(self) -> int:
        return self.parallel.context_parallel_size

    @property
    def data_size(self) -> int:
        """Ranks that get rows of their own."""
        layout = self.parallel
        return self.world_size // (
            layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * self.context
        )

    @property
    def row_length(self) -> int:
        """Tokens of a full row, or under context parallelism of a rank's part of it, rounded as the trainers round."""
        if self.context == 1:
            return self._whole_row
        return shared_length(self._whole_row, self.context, self.model.block_size, self._row_multiple)

    @property
    def _whole_row(self) -> int:
        return -(-self.row_budget // self._row_multiple) * self._row_multiple

    @property
    def _row_multiple(self) -> int:
        return row_multiple(self.parallel.tensor_model_parallel_size, self.parallel.token_multiple, self.attention)

    @property
    def tokens_per_group(self) -> int:
        """Of a prompt with as many of its responses as a row holds together."""
        texts = self.texts
        together = max(1, min(self.samples, (self.row_budget - texts.prompt) // max(1, texts.own)))
        return texts.prompt + together * texts.own

    @property
    def row(self) -> RowShape:
        """Of one rank."""
        texts = self.texts
        share = (self.tokens_per_group - texts.prompt) * texts.response / texts.own / self.tokens_per_group
        held = self.row_budget / self.context  # the rest of a part is padding
        return RowShape(self.row_length, max(1, round(held * share * self.texts.predicted)))

    @property
    def kept(self) -> Kept:
        """What attention keeps of it."""
        length = self.row.tokens
        clean = self.texts.prompt + self.texts.response
        share = clean / (self.texts.prompt + self.texts.own)
        gathered = round(length * (self.context - 1) * share)
        if not self.dense_attention:
            return Kept(gathered=gathered)
        return Kept(group_lengths(length, self.tokens_per_group), repeats=_shares_heads(self.model), gathered=gathered)

    @property
    def microbatches(self) -> int:
        """Rows of one update on each rank, when all of them are full."""
        texts = self.texts
        each = texts.own + texts.prompt / max(1, self.samples)
        rows = math.ceil(self.responses * each / self.row_budget / self.data_size)
        stages = 1 if self.parallel.num_virtual_stages_per_pipeline_rank is None else self.stages
        return max(1, -(-rows // stages) * stages)

    @property
    def stages(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    def changed(self, **sections: Any) -> Job:
        """The same job with other settings."""
        return dataclasses.replace(self, **sections)


def job_of(config: dict[str, Any], model: ModelConfig, world_size: int) -> Job:
    """The job that the settings of `sft` or `tracerl` describe.

    Args:
        config: sections by name, checked, with `plan`. model: resolved.
    """
    plan = config["plan"]
    common = dict(
        world_size=world_size,
        model=model,
        parallel=config["parallel"],
        optimizer=config["optimizer"],
        lora=config.get("lora"),
        dense_attention=_is_dense(plan, config["parallel"]),
    )
    if "rl" not in config:
        sft = config["sft"]
        longest = min(sft.seq_length or model.max_position_embeddings, sft.max_tokens_per_row)
        prompt = longest // 4
        response = plan.plan_response_length or (longest - prompt) // 2
        texts = _texts(plan, prompt, longest - prompt, *_copies(sft, model, plan, max(1, response)))
        return Job(
            **common,
            texts=texts,
            row_budget=sft.max_tokens_per_row,
            responses=sft.global_batch_size,
            updates=1,
            samples=1,
        )
    rl, rollout, value = with_method(config["rl"]), config["rollout"], config["value"]
    block = rollout.rollout_block_size or model.block_size or rollout.rollout_max_response_len
    slowest = rollout.denoising_steps or block
    copies = max(1.0, min(slowest, block / plan.plan_tokens_per_step)) if not model.full_attention else 1.0
    responses = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    updates = rl.num_steps_per_rollout or -(-responses // rl.global_batch_size)
    return Job(
        **common,
        texts=_texts(plan, rollout.rollout_max_prompt_len, rollout.rollout_max_response_len, copies),
        row_budget=rl.max_tokens_per_row,
        responses=-(-responses // updates),
        updates=updates,
        samples=rollout.n_samples_per_prompt,
        rl=rl,
        rollout=rollout,
        value_optimizer=optimizer_config(value, config["optimizer"]) if value.use_value_model else None,
    )


def _copies(sft: SFTConfig, model: ModelConfig, plan: PlanConfig, response: int) -> tuple[float, float]:
    """Noisy copies of a text that an objective of fine-tuning makes, and how often they predict a token."""
    objective = with_objective(sft)
    if sft.sft_objective in MASKED:
        copies = float(num_masks(sft))
        ratio = 0.5 if sft.complementary_masks else (objective.min_mask_ratio + objective.max_mask_ratio) / 2
        predicted = copies * ratio
        if sft.sft_objective == "semi_ar" and model.full_attention:  # a copy of the text for each slice
            copies *= -(-response // sft.slice_size)
    else:
        steps = (model.block_size or 1) / plan.plan_tokens_per_step / sft.shrinkage
        copies, predicted = (0.0 if sft.sft_objective == "ar" else max(1.0, steps)), 1.0
    beside = 1 if sft.ar_loss_coef else 0  # a copy that is read causally
    return copies + beside, predicted + beside


def _texts(
    plan: PlanConfig, longest_prompt: int, longest_response: int, copies: float, predicted: float = 1.0
) -> Texts:
    return Texts(
        max(1, plan.plan_prompt_length or longest_prompt // 2),
        max(1, plan.plan_response_length or longest_response // 2),
        longest_prompt,
        longest_response,
        copies,
        predicted,
    )


def _is_dense(plan: PlanConfig, parallel: ParallelConfig) -> bool:
    """Whether the attention of the job is the dense one."""
    asked = plan.plan_attention if plan.plan_attention != "auto" else parallel.attention_backend
    return asked == "dense"


def _shares_heads(model: ModelConfig) -> bool:
    """Keys and values are repeated for the dense attention of a GPU where heads share them."""
    return model.num_query_groups != model.num_attention_heads


def chunks_in_flight(stage: int, stages: int, virtual: int, microbatches: int) -> tuple[int, ...]:
    """For each virtual stage of a pipeline rank, the microbatches whose activations are there at the same time.

    Without interleaving a stage runs ahead of its first backward pass by as many microbatches as there are stages
    behind it. With it the unit is a microbatch of one chunk: chunks take turns after every `stages` microbatches, and a
    rank runs ahead by 2 for each stage behind it and by a round of all its chunks but the last.

    Source: the schedules of megatron-core (pipeline_parallel/schedules.py); PipeDream-flush and Megatron-LM, arXiv
    2104.04473, section 2.2.
    """
    if stages == 1:
        return (1,)
    if virtual == 1:
        return (min(microbatches, stages - stage),)
    ahead = (stages - stage - 1) * 2 + (virtual - 1) * stages
    total = min(microbatches * virtual, ahead + 1)
    counts = [0] * virtual
    for number in range(total):
        counts[number // stages % virtual] += 1
    return tuple(counts)
