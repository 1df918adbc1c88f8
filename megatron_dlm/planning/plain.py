"""A job as the cost model and the formula of memory have it: a layout and a workload, as plain numbers."""

from __future__ import annotations

from megatron_dlm.planning.job import Job
from megatron_dlm.planning.layout import Layout, Workload, lengths


def layout_of(job: Job) -> Layout:
    """The layout as the cost model has it."""
    one, engine = job.parallel, job.rollout
    return Layout(
        world=job.world_size,
        tp=one.tensor_model_parallel_size,
        pp=one.pipeline_model_parallel_size,
        cp=one.context_parallel_size,
        ep=one.expert_model_parallel_size,
        etp=one.expert_tensor_parallel_size,
        vpp=one.num_virtual_stages_per_pipeline_rank or 1,
        sequence_parallel=one.sequence_parallel,
        distributed_optimizer=one.use_distributed_optimizer,
        overlap=one.overlap_grad_reduce,
        recompute=recomputation(job)[0] or "none",
        precision=job.precision,
        rollout_tp=None if engine is None else engine.rollout_tensor_model_parallel_size,
        rollout_fp8=engine is not None and engine.rollout_weights == "fp8",
    )


def workload_of(job: Job) -> Workload:
    """A step as the cost model has it."""
    texts, model = job.texts, job.model
    common = dict(
        prompt_length=texts.prompt,
        responses=lengths(texts.response, max(texts.response, texts.longest_response)),
        block_size=model.block_size or texts.longest_response,
        row_budget=job.row_budget,
        attention=job.attention,
        itemsize=2 if model.bf16 else 4,
        triton_head=job.triton_head,
    )
    if job.rl is None:
        return Workload(
            prompts=job.responses, samples=1, steps_per_block=1.0, rollout=False, old_logprobs="current", **common
        )
    return Workload(
        prompts=job.rollout.rollout_batch_size,
        samples=job.samples,
        steps_per_block=job.texts.copies,
        updates=job.updates,
        old_logprobs=job.rl.old_logprobs,
        reference=job.has_reference,
        value_model=job.value_optimizer is not None,
        together=job.value_optimizer is not None,
        max_running=job.rollout.max_running_requests,
        **common,
    )


def recomputation(job: Job) -> tuple[str | None, str]:
    """What is computed again (None, 'selective' or 'full'), and whether a flag or an override says so."""
    override = job.model.transformer_overrides.get("recompute_granularity")
    return (override, "override") if override else (getattr(job.parallel, "recompute_granularity", None), "flag")
