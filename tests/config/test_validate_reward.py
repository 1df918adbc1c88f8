"""Rewards that cannot work, and that the rest is let through."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.reward import JudgeConfig, RewardConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate_reward import check_judge, check_shaping

THERE = {"judge_url": "http://127.0.0.1:8000/v1", "judge_model": "m"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        THERE,
        THERE | {"reward": "judge", "judge_temperature": 0.0, "judge_retries": 0},
        THERE | {"judge_url": "https://judge.example.org/api/v1/"},
    ],
)
def test_judges_that_work(settings):
    check_judge(JudgeConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"judge_url": "http://h/v1"}, "--judge-url needs --judge-model"),
        ({"judge_model": "m"}, "--judge-model needs --judge-url"),
        ({"reward": "judge"}, "--reward judge asks a model"),
        (THERE | {"judge_url": "127.0.0.1:8000"}, "no address of an endpoint"),
        (THERE | {"judge_url": "http:///v1"}, "no address of an endpoint"),
        (THERE | {"judge_url": "http://h:port/v1"}, "no address of an endpoint"),
        (THERE | {"judge_url": "http://h:99999/v1"}, "no address of an endpoint"),
        (THERE | {"judge_url": "file:///etc/passwd"}, "no address of an endpoint"),
        (THERE | {"judge_url": "http://user:word@h/v1"}, "JUDGE_API_KEY"),
        (THERE | {"judge_url": "http://h/v1/chat/completions"}, "more than the base"),
        (THERE | {"judge_url": "http://h/v1?key=1"}, "more than the base"),
        ({"judge_votes": 0}, "--judge-votes is 0"),
        ({"judge_max_tokens": 0}, "--judge-max-tokens is 0"),
        ({"judge_concurrency": 0}, "--judge-concurrency is 0"),
        ({"judge_concurrency": 5000}, "--judge-concurrency is 5000"),
        ({"judge_retries": -1}, "--judge-retries is -1"),
        ({"judge_timeout": 0.0}, "--judge-timeout is 0"),
        ({"judge_timeout": 1e9}, "--judge-timeout is 1"),
        ({"judge_temperature": -0.1}, "--judge-temperature"),
        ({"judge_temperature": 1e-9}, "--judge-temperature"),
        ({"judge_votes": 5}, "--judge-votes 5 does nothing without --judge-url"),
        ({"judge_temperature": 0.0}, "--judge-temperature 0.0 does nothing without --judge-url"),
        ({"judge_max_tokens": 9}, "--judge-max-tokens 9 does nothing"),
        ({"judge_timeout": 9.0}, "--judge-timeout 9.0 does nothing"),
        ({"judge_retries": 9}, "--judge-retries 9 does nothing"),
        ({"judge_concurrency": 9}, "--judge-concurrency 9 does nothing"),
        ({"code_time_limit": 0.0}, "--code-time-limit is 0"),
        ({"code_response_time_limit": 7.0}, "--code-response-time-limit 7.0 leaves no time for one test"),
        ({"code_memory_limit_mib": 63}, "--code-memory-limit-mib is 63"),
        ({"code_max_output_kib": 0}, "--code-max-output-kib is 0"),
        ({"code_max_processes": 0}, "--code-max-processes is 0"),
    ],
)
def test_judges_that_do_not(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_judge(JudgeConfig(**settings))


ROLLOUT = RolloutConfig(rollout_max_response_len=100)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"format_reward": "think", "overlong_buffer_len": 99, "short_reward_coef": 1.0, "speed_reward_coef": 1.0},
        {"format_reward": r"a+\.?", "format_reward_coef": 2.0, "overlong_buffer_len": 9, "overlong_penalty_coef": 2.0},
        {"speed_reward_coef": 0.5, "speed_min_range": 1.0, "speed_reward_of": "correct"},
        {"process_reward": "a:f", "process_chunk_tokens": 9, "process_chunk_grid": "token"},
        THERE | {"process_reward": "endpoint"},
    ],
)
def test_rewards_that_work(settings):
    check_shaping(RewardConfig(**settings), ROLLOUT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format_reward": "(a"}, r"--format-reward '\(a' is no regular expression"),
        ({"format_reward_coef": 0.0}, "--format-reward-coef is 0"),
        ({"overlong_buffer_len": 100}, "--overlong-buffer-len 100 .* less than --rollout-max-response-len 100"),
        ({"overlong_buffer_len": -1}, "--overlong-buffer-len is -1"),
        ({"overlong_penalty_coef": 0.0}, "--overlong-penalty-coef is 0"),
        ({"short_reward_coef": -1.0}, "--short-reward-coef is -1"),
        ({"speed_reward_coef": -1.0}, "--speed-reward-coef is -1"),
        ({"speed_min_range": 0.0}, "--speed-min-range is 0"),
        ({"process_chunk_tokens": 0}, "--process-chunk-tokens is 0"),
        ({"process_reward": "endpoint"}, "--process-reward endpoint asks a model"),
        ({"process_reward": "judge.py"}, "--process-reward is 'judge.py'"),
        ({"process_reward": ":f"}, "--process-reward is ':f'"),
        ({"format_reward_coef": 0.5}, "--format-reward-coef 0.5 does nothing without --format-reward"),
        ({"overlong_penalty_coef": 2.0}, "--overlong-penalty-coef 2.0 does nothing without --overlong-buffer-len"),
        ({"speed_min_range": 1.0}, "--speed-min-range 1.0 does nothing without --speed-reward-coef"),
        ({"speed_reward_of": "correct"}, "--speed-reward-of correct does nothing without --speed-reward-coef"),
        ({"process_chunk_tokens": 9}, "--process-chunk-tokens 9 does nothing without --process-reward"),
        ({"process_chunk_grid": "token"}, "--process-chunk-grid token does nothing without --process-reward"),
    ],
)
def test_rewards_that_do_not(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_shaping(RewardConfig(**settings), ROLLOUT)
