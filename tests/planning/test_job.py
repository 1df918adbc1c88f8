"""The rows that follow from settings."""

from __future__ import annotations

import pytest

from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.plan import PlanConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.value import ValueConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning.attention import group_lengths
from megatron_dlm.planning.job import job_of
from megatron_dlm.planning.search import candidates, flags_of, possible


def rl_job(world=8, plan=None, **layout):
    model = resolve(ModelConfig(model_preset="sdar-8b", bf16=True), None)
    config = dict(
        plan=plan or PlanConfig(plan_prompt_length=100, plan_response_length=500, plan_tokens_per_step=2.0),
        parallel=ParallelConfig(**layout),
        optimizer=OptimizerConfig(),
        rl=RLConfig(global_batch_size=128, max_tokens_per_row=8000),
        rollout=RolloutConfig(rollout_max_prompt_len=400, rollout_max_response_len=1000),
        value=ValueConfig(),
    )
    return job_of(config, model, world)


def test_rows_are_rounded_as_the_planner_rounds():
    assert rl_job(attention_backend="dense").row.tokens == 8000  # 125 x 64
    assert rl_job().row.tokens == 8064  # 63 tiles of 128
    shared = dict(tensor_model_parallel_size=4, context_parallel_size=2)
    assert rl_job(**shared).row.tokens == 4096  # 8064 / 2, and 3 for a block: 32 tiles
    fp8 = dict(transformer_impl="transformer_engine", fp8_format="hybrid", fp8_recipe="blockwise")
    shared = dict(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True)
    assert rl_job(**fp8, **shared).row.tokens == 4352  # 8192 / 2, and 3: 17 blocks of 128 on each of 2 ranks


def test_a_trace_is_learned_in_a_copy_per_step():
    texts = rl_job().texts
    assert texts.copies == 2  # blocks of 4, two tokens a step
    assert texts.own == 1500
    assert rl_job(plan=PlanConfig(plan_tokens_per_step=0.5)).texts.copies == 4  # no more steps than tokens
    assert rl_job(plan=PlanConfig(plan_tokens_per_step=9.0)).texts.copies == 1


def test_targets_are_the_response_tokens_of_a_row():
    job = rl_job()
    # A prompt of 100 and five of its responses fill 7600 of the budget: 2500 targets.
    assert job.tokens_per_group == 7600
    assert job.row.targets == round(8000 * 2500 / 7600)


def test_full_rows_hold_an_update():
    job = rl_job()
    assert job.responses == 128
    assert job.microbatches == 4  # 128 responses of 1500 tokens, and their prompts, in rows of 8000 on 8 ranks


def test_fine_tuning_has_one_copy_and_half_the_targets():
    model = resolve(ModelConfig(model_preset="sdar-8b", bf16=True), None)
    config = dict(
        plan=PlanConfig(plan_prompt_length=100, plan_response_length=300),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(),
        sft=SFTConfig(max_tokens_per_row=7000),
    )
    job = job_of(config, model, 1)
    assert job.rl is None and job.texts.own == 600
    assert job.row.targets == round(7000 * 300 / 700 * (0.001 + 1) / 2)


@pytest.mark.parametrize(
    "settings, copies, predicted",
    [
        ({}, 1, 0.5005),
        (dict(sft_objective="semi_ar", mask_draws=2), 2, 1),
        (dict(complementary_masks=True), 2, 1),
        (dict(sft_objective="trace"), 2, 1),  # blocks of 4, two tokens a step
        (dict(sft_objective="trace", shrinkage=2), 1, 1),
        (dict(sft_objective="ar"), 0, 1),
        (dict(ar_loss_coef=0.1), 2, 1.5005),
    ],
)
def test_what_an_objective_makes_of_a_text(settings, copies, predicted):
    model = resolve(ModelConfig(model_preset="sdar-8b"), None)
    plan = PlanConfig(plan_prompt_length=100, plan_response_length=300, plan_tokens_per_step=2.0)
    sections = dict(plan=plan, parallel=ParallelConfig(), optimizer=OptimizerConfig(), sft=SFTConfig(**settings))
    texts = job_of(sections, model, 1).texts
    assert (texts.copies, texts.predicted) == (copies, pytest.approx(predicted))


def test_slices_under_full_attention_are_copies_of_the_text():
    model = resolve(ModelConfig(model_preset="dream-7b"), None)
    plan, sft = PlanConfig(plan_prompt_length=100, plan_response_length=300), SFTConfig(sft_objective="semi_ar")
    sections = dict(plan=plan, parallel=ParallelConfig(), optimizer=OptimizerConfig(), sft=sft)
    texts = job_of(sections, model, 1).texts
    assert (texts.copies, texts.predicted) == (19, 0.5)  # slices of 16


@pytest.mark.parametrize(("tokens", "typical"), [(100, 30), (90, 30), (10, 30), (1, 1)])
def test_groups_fill_a_row(tokens, typical):
    lengths = group_lengths(tokens, typical)
    assert sum(lengths) == tokens and max(lengths) <= typical


def test_cheaper_settings_are_tried_first():
    job = rl_job(world=16)
    tried = [flags_of(job, candidate) for candidate in candidates(job) if possible(candidate)]
    assert tried[0] == "--use-distributed-optimizer"
    first = lambda flag: next(index for index, flags in enumerate(tried) if flag in flags)
    order = ["--offload-rollout", "selective", "full", "--max-tokens-per-row", "--context", "--tensor", "--pipeline"]
    assert [first(flag) for flag in order] == sorted(first(flag) for flag in order)
    assert len(set(tried)) == len(tried)


def test_flags_say_what_differs():
    job = rl_job()
    assert flags_of(job, job) == ""
    other = job.changed(parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), row_budget=4000)
    assert flags_of(job, other) == ("--tensor-model-parallel-size 2 --sequence-parallel --max-tokens-per-row 4000")
