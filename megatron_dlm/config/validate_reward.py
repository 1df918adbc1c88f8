"""What of rewards cannot work, refused before anything is built.

The rules of these checks are those of `validate`.
"""

from __future__ import annotations

import re
import urllib.parse

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.reward import FORMS, JudgeConfig, RewardConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate import above, at_least, check_temperature, needs, only_with, within

LONGEST_WAIT = 86400  # seconds
MOST_REQUESTS = 4096
_OF_THE_MODEL = (
    "judge_votes", "judge_temperature", "judge_max_tokens", "judge_timeout", "judge_retries", "judge_concurrency",
)  # fmt: skip
LEAST_MEMORY_MIB = 64  # an interpreter needs some itself
_READ_WITH = {  # settings of one kind of reward, by the one that asks for it
    "format_reward": ("format_reward_coef",),
    "overlong_buffer_len": ("overlong_penalty_coef",),
    "speed_reward_coef": ("speed_min_range", "speed_reward_of"),
    "process_reward": ("process_chunk_tokens", "process_chunk_grid"),
}


def check_judge(config: JudgeConfig) -> None:
    """Refuse a model that judges and cannot be asked."""
    within(config, 0, LONGEST_WAIT, "code_time_limit", "code_response_time_limit", low_open=True)
    at_least(config, LEAST_MEMORY_MIB, "code_memory_limit_mib")
    at_least(config, 1, "code_max_output_kib", "code_max_processes")
    if config.code_response_time_limit <= 3 * config.code_time_limit + 1:
        raise ConfigError(
            f"--code-response-time-limit {config.code_response_time_limit} leaves no time for one test, which may take "
            f"{3 * config.code_time_limit + 1} seconds with --code-time-limit {config.code_time_limit}. Raise it."
        )
    needs(config, "judge_url", "judge_model", "the name of the model there")
    needs(config, "judge_model", "judge_url", "where that model is")
    at_least(config, 1, "judge_votes", "judge_max_tokens")
    at_least(config, 0, "judge_retries")
    within(config, 0, LONGEST_WAIT, "judge_timeout", low_open=True)
    within(config, 1, MOST_REQUESTS, "judge_concurrency")
    check_temperature(config, "judge_temperature")
    if config.judge_url is not None:
        _check_url(config.judge_url)
    else:
        for name in _OF_THE_MODEL:
            only_with(config, name, "--judge-url")
    if config.reward == "judge" and config.judge_url is None:
        raise _no_judge("--reward judge")


def check_shaping(config: RewardConfig, rollout: RolloutConfig) -> None:
    """Refuse rewards beside the verdict that cannot work with this rollout."""
    above(config, 0, "format_reward_coef", "overlong_penalty_coef", "speed_min_range")
    at_least(config, 0, "overlong_buffer_len", "short_reward_coef", "speed_reward_coef")
    at_least(config, 1, "process_chunk_tokens")
    if config.format_reward is not None:
        _check_form(config.format_reward)
    for other, names in _READ_WITH.items():
        if not getattr(config, other):
            for name in names:
                only_with(config, name, flag_name(other))
    longest = rollout.rollout_max_response_len
    if config.overlong_buffer_len >= longest and config.overlong_buffer_len:
        raise ConfigError(
            f"--overlong-buffer-len {config.overlong_buffer_len} would punish every response. "
            f"Use less than --rollout-max-response-len {longest}."
        )
    process = config.process_reward
    if process == "endpoint" and config.judge_url is None:
        raise _no_judge("--process-reward endpoint")
    if process not in (None, "endpoint") and not all(process.partition(":")):
        raise ConfigError(f"--process-reward is {process!r}. Use endpoint, or name a function as module:function.")


def _check_form(form: str) -> None:
    if form in FORMS:
        return
    try:
        re.compile(form)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"--format-reward {form!r} is no regular expression ({error}). Use {' or '.join(FORMS)}, or correct it."
        ) from None


def _no_judge(flag: str) -> ConfigError:
    return ConfigError(f"{flag} asks a model, and --judge-url is not set. Give --judge-url and --judge-model.")


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or too large
        good = False
    if not good:
        raise ConfigError(
            f"--judge-url {url} is no address of an endpoint. Write it like http://127.0.0.1:8000/v1, without "
            "/chat/completions."
        )
    if parts.username or parts.password:
        raise ConfigError("--judge-url holds a name or a password. Put a key into the variable JUDGE_API_KEY instead.")
    if parts.path.rstrip("/").endswith("/chat/completions") or parts.query or parts.fragment:
        raise ConfigError(f"--judge-url {url} is more than the base of an endpoint. Leave out what follows its /v1.")
