"""Every refusal of RL settings and objectives, and the combinations that must pass."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.objective import METHODS
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate_rl import check_rl, check_sections
from megatron_dlm.config.value import ValueConfig
from tests.config.test_validate_training import MODEL, expect, run

FULL = dataclasses.replace(MODEL, full_attention=True, block_size=None)
GIVEN = dict(prompt_data=["a.jsonl"], num_steps_per_rollout=1)


def test_the_defaults_pass_once_data_and_update_size_are_given():
    check_rl(RLConfig(**GIVEN), RolloutConfig(), MODEL)


SAMPLED = dict(old_logprobs="rollout")


@pytest.mark.parametrize(
    ("values", "rollout", "words"),
    [
        (dict(prompt_data=[]), {}, ["--prompt-data names no prompt source"]),
        (dict(num_rollout=0), {}, ["--num-rollout is 0"]),
        (dict(max_tokens_per_row=0), {}, ["--max-tokens-per-row is 0"]),
        (dict(shrinkage=0), {}, ["--shrinkage is 0"]),
        (dict(eps_clip=0.0), {}, ["--eps-clip is 0.0"]),
        (dict(eps_clip=1.0), {}, ["--eps-clip is 1.0"]),
        (dict(eps_clip_high=0.0), {}, ["--eps-clip-high is 0.0"]),
        (dict(eps_clip_high=2.0), {}, None),
        (dict(kl_loss_coef=-0.1), {}, ["--kl-loss-coef is -0.1"]),
        (dict(max_empty_steps=0), {}, ["--max-empty-steps is 0"]),
        (dict(min_group_accuracy=-0.1), {}, ["--min-group-accuracy is -0.1"]),
        (dict(max_group_accuracy=1.1), {}, ["--max-group-accuracy is 1.1"]),
        (dict(min_group_accuracy=0.0, max_group_accuracy=1.0), {}, None),
        (dict(min_group_accuracy=0.9), {}, ["--min-group-accuracy 0.9", "--max-group-accuracy 0.8", "Swap"]),
        (dict(overlong_margin=-1), {}, ["--overlong-margin is -1"]),
        (dict(log_samples=-1), {}, ["--log-samples is -1"]),
        (dict(log_samples=0), {}, None),
        (dict(overlong_margin=256), {}, ["--overlong-margin 256", "--rollout-max-response-len 256"]),
        ({}, dict(n_samples_per_prompt=1), ["--n-samples-per-prompt 1", "2 or more"]),
        (dict(num_steps_per_rollout=None), {}, ["--global-batch-size", "--num-steps-per-rollout", "neither is given"]),
        (dict(global_batch_size=16), {}, ["--global-batch-size", "--num-steps-per-rollout", "both are given"]),
        (dict(global_batch_size=1024, num_steps_per_rollout=None), {}, None),
        (dict(global_batch_size=1025, num_steps_per_rollout=None), {}, ["--global-batch-size 1025", "1024 responses"]),
        (dict(global_batch_size=0, num_steps_per_rollout=None), {}, ["--global-batch-size is 0"]),
        (dict(num_steps_per_rollout=0), {}, ["--num-steps-per-rollout is 0"]),
        (
            dict(num_steps_per_rollout=9),
            dict(rollout_batch_size=2, n_samples_per_prompt=4),
            ["--num-steps-per-rollout 9", "8 responses"],
        ),
        (SAMPLED, {}, None),
        (SAMPLED, dict(rollout_block_size=4), None),
        (dict(SAMPLED, shrinkage=2), {}, ["--old-logprobs rollout", "--shrinkage 1"]),
        (dict(shrinkage=2), {}, None),
        (dict(SAMPLED, grid_anchor="response"), {}, ["--old-logprobs rollout", "--grid-anchor absolute"]),
        (dict(grid_anchor="response"), {}, None),
        ({}, dict(rollout_block_size=8), None),
        ({}, dict(rollout_temperature=0.0), ["--rollout-temperature 0", "above 0"]),
    ],
)
def test_rl(values, rollout, words):
    rl = RLConfig(**{"prompt_data": ["a.jsonl"], "num_steps_per_rollout": 1, **values})
    expect(run(check_rl, rl, RolloutConfig(**rollout), MODEL), words)


def test_rollout_log_probabilities_of_a_bfloat16_model():
    rl = RLConfig(prompt_data=["a.jsonl"], num_steps_per_rollout=1, old_logprobs="rollout")
    expect(run(check_rl, rl, RolloutConfig(), dataclasses.replace(MODEL, bf16=True)), ["--bf16"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_with_its_own_settings(method):
    teacher = dict(teacher_load="there") if method == "opd" else {}
    check_rl(RLConfig(**GIVEN, rl_method=method, **teacher), RolloutConfig(), MODEL)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(eps_clip_c=1.0), ["--eps-clip-c is 1.0"]),
        (dict(eps_clip_c=3.0), None),
        (dict(mask_draws=0), ["--mask-draws is 0"]),
        (dict(mask_draws=2), ["--mask-draws does nothing", "tracerl"]),
        (dict(rl_method="coupled", mask_draws=2), None),
        (dict(mask_ratio_low=0.2), ["--mask-ratio-low does nothing", "tracerl"]),
        (dict(rl_method="random_masking", mask_ratio_low=0.9, mask_ratio_high=0.2), ["Swap"]),
        (dict(rl_method="random_masking", shrinkage=2), ["--shrinkage does nothing", "random_masking"]),
        (dict(rl_method="random_masking", coupled_estimator="paired"), ["--coupled-estimator does nothing"]),
        (dict(rl_method="coupled", mask_ratio_spread=0.1), ["--mask-ratio-spread does nothing"]),
        (dict(rl_method="slim_rl", mask_ratio_spread=0.1), None),
        (dict(rl_method="slim_rl", mask_ratio_per="token"), ["--mask-ratio-per does nothing"]),
        (dict(rl_method="espo", mask_ratio_high=1.0), ["--mask-ratio-high 1"]),
        (dict(rl_method="espo", loss_aggregation="constant"), ["--loss-aggregation constant", "espo", "response"]),
        (dict(rl_method="ebpo", loss_aggregation="token"), None),
        (dict(rl_method="espo", use_tis=True), ["--use-tis", "tracerl or dipo"]),
        (dict(rl_method="coupled", use_tis=True), ["--use-tis", "tracerl or dipo"]),
        (dict(shrinkage=2, use_tis=True), ["--use-tis", "--shrinkage 1"]),
        (dict(grid_anchor="response", use_tis=True), ["--use-tis", "--grid-anchor absolute"]),
        (dict(use_tis=True), None),
        (dict(rl_method="dipo", use_tis=True), None),
        (dict(tis_clip=3.0), ["--tis-clip does nothing without --use-tis"]),
        (dict(distill_kl="jsd"), ["--distill-kl does nothing without --distill-coef"]),
        (dict(kl_aggregation="slice_sum", kl_loss_coef=0.0), ["--kl-aggregation does nothing"]),
        (dict(kl_aggregation="slice_sum", loss_aggregation="slice"), None),
        (dict(rl_method="espo", kl_aggregation="slice_sum"), ["--kl-aggregation slice_sum", "espo"]),
        (dict(loss_aggregation="slice", rl_method="coupled", coupled_estimator="paired"), ["slice", "paired"]),
        (dict(rl_method="dipo", eps_clip=0.3), ["--eps-clip does nothing"]),
        (dict(rl_method="dipo", kl_loss_coef=0.5), ["--kl-loss-coef 0.5 does nothing", "--kl-reference frozen"]),
        (dict(rl_method="dipo", kl_loss_coef=0.5, kl_reference="frozen", ref_load="there"), None),
        (dict(rl_method="opd", teacher_load="there", eps_clip_c=3.0), ["--eps-clip-c does nothing"]),
        (dict(entropy_coef=-1.0), ["--entropy-coef is -1"]),
        (dict(use_tis=True, old_logprobs="rollout"), ["--use-tis", "--old-logprobs rollout"]),
        (dict(use_tis=True, tis_clip_low=3.0), ["--tis-clip-low 3.0", "--tis-clip 2.0", "Swap"]),
        (dict(rl_method="espo", old_logprobs="rollout"), ["--old-logprobs rollout", "espo"]),
        (dict(old_logprobs="current"), None),
        (dict(kl_reference="frozen"), ["--kl-reference frozen needs --ref-load"]),
        (dict(kl_reference="frozen", ref_load="there", kl_loss_coef=0.0), ["--kl-reference frozen does nothing"]),
        (dict(kl_reference="frozen", ref_load="there"), None),
        (dict(ref_load="there"), ["--ref-load does nothing"]),
        (dict(distill_coef=0.1), ["--distill-coef 0.1 needs --teacher-load"]),
        (dict(rl_method="opd"), ["--rl-method opd needs --teacher-load"]),
        (dict(distill_coef=0.1, teacher_load="there"), None),
        (dict(teacher_load="there"), ["--teacher-load", "--distill-coef"]),
        (dict(policy_loss_coef=0.0), ["nothing to learn"]),
    ],
)
def test_objectives(values, words):
    expect(run(check_rl, RLConfig(**GIVEN, **values), RolloutConfig(), MODEL), words)


def test_rollout_log_probabilities_under_full_attention():
    rl = RLConfig(**GIVEN, old_logprobs="rollout")
    rollout = RolloutConfig(rollout_block_size=4)
    expect(run(check_rl, rl, rollout, FULL), ["--no-prefix-cache"])
    check_rl(rl, dataclasses.replace(rollout, prefix_cache=False), FULL)


def test_distillation_needs_one_response_only():
    rl = RLConfig(**GIVEN, rl_method="opd", teacher_load="there")
    check_rl(rl, RolloutConfig(n_samples_per_prompt=1), MODEL)


@pytest.mark.parametrize(
    ("rl", "value", "reward", "curriculum", "words"),
    [
        ({}, dict(use_value_model=True), dict(process_reward="endpoint"), {}, None),
        (dict(rl_method="dipo"), dict(use_value_model=True), {}, {}, None),
        (dict(rl_method="espo"), {}, dict(speed_reward_coef=1.0), {}, None),
        (dict(rl_method="espo"), dict(use_value_model=True), {}, {}, ["--use-value-model", "espo", "tracerl or dipo"]),
        (dict(rl_method="coupled"), {}, dict(process_reward="endpoint"), {}, ["--process-reward", "coupled"]),
        ({}, {}, dict(process_reward="a:b", speed_reward_coef=0.5), {}, ["--process-reward", "--speed-reward-coef"]),
        ({}, {}, dict(process_reward="a:b", format_reward="boxed"), {}, ["--process-reward", "--format-reward"]),
        (dict(rl_method="opd"), {}, {}, dict(dynamic_sampling=True), ["--dynamic-sampling", "teacher"]),
        (dict(rl_method="opd", policy_loss_coef=0.5), {}, {}, dict(dynamic_sampling=True), None),
    ],
)
def test_sections_that_contradict_each_other(rl, value, reward, curriculum, words):
    given = (RLConfig(**rl), ValueConfig(**value), RewardConfig(**reward), CurriculumConfig(**curriculum))
    expect(run(check_sections, *given), words)
