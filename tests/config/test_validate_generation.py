"""Every refusal of the settings of generate, score and trace, and the combinations that must pass."""

from __future__ import annotations

import pytest

from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.score import ScoreConfig
from megatron_dlm.config.trace import TraceConfig
from megatron_dlm.config.validate_generation import (
    check_draw_of_model,
    check_generate,
    check_score,
    check_trace,
    check_trace_of_model,
)

FILES = dict(prompts="in.jsonl", output="out.jsonl")
LOAD = LoadConfig(load="ckpt")


def refused(check, *arguments) -> str | None:
    """The message of the refusal, or None when the check passes."""
    try:
        check(*arguments)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(remasking="entropy_bounded", confidence="entropy", horizon=0, prefix_cache=False),
        dict(temperature=0.0, top_k=1, top_p=0.5, threshold=1.0, denoising_steps=1, stop_token_ids=[]),
        dict(num_samples=100, max_new_tokens=1, max_running_requests=1, max_tokens_per_pass=1, ignore_eos=True),
    ],
)
def test_settings_of_generate_that_pass(changes: dict) -> None:
    check_generate(GenerateConfig(**FILES, **changes), LOAD)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_samples=0), "--num-samples is 0"),
        (dict(max_new_tokens=0), "--max-new-tokens is 0"),
        (dict(denoising_steps=0), "--denoising-steps is 0"),
        (dict(max_running_requests=0), "--max-running-requests is 0"),
        (dict(max_tokens_per_pass=0), "--max-tokens-per-pass is 0"),
        (dict(temperature=-0.1), "--temperature is -0.1"),
        (dict(top_k=-1), "--top-k is -1"),
        (dict(top_p=0.0), "--top-p is 0.0"),
        (dict(top_p=1.1), "--top-p is 1.1"),
        (dict(threshold=0.0), "--threshold is 0.0"),
        (dict(rollout_block_size=0), "--rollout-block-size is 0"),
        (dict(entropy_bound=0.0), "--entropy-bound is 0.0"),
        (dict(confidence="entropy"), "--threshold is 0.9"),
        (dict(horizon=-1), "--horizon is -1"),
        (dict(prompts=None), "--prompts is not set"),
        (dict(output=None), "--output is not set"),
        (dict(prompts="./out.jsonl"), "--output out.jsonl is the file that --prompts names"),
    ],
)
def test_settings_of_generate_that_do_not(changes: dict, words: str) -> None:
    assert words in refused(check_generate, GenerateConfig(**FILES | changes), LOAD)


BLOCKS, FULL = ModelConfig(block_size=4), ModelConfig(full_attention=True)


@pytest.mark.parametrize(
    "changes, model, words",
    [
        (dict(), BLOCKS, None),
        (dict(denoising_steps=4, stop_token_ids=[3]), BLOCKS, None),
        (dict(denoising_steps=5), BLOCKS, "--denoising-steps 5 is more than the 4 tokens"),
        (dict(denoising_steps=5, rollout_block_size=8), BLOCKS, None),
        (dict(stop_token_ids=[100]), BLOCKS, "--stop-token-ids 100 is not a token"),
        (dict(stop_token_ids=[99]), BLOCKS, "--stop-token-ids 99 is the mask"),
        (dict(horizon=1), BLOCKS, "--horizon 1"),
        (dict(), FULL, "--rollout-block-size"),
        (dict(rollout_block_size=8, horizon=0, prefix_cache=False), FULL, None),
    ],
)
def test_settings_of_generate_for_a_model(changes: dict, model: ModelConfig, words: str | None) -> None:
    message = refused(check_draw_of_model, GenerateConfig(**FILES, **changes), model, 100, 99)
    assert message is None if words is None else words in message


@pytest.mark.parametrize(
    "changes, block_size, words",
    [
        (dict(), None, None),
        (dict(temperature=0.0, max_tokens_per_row=1), 1, None),
        (dict(temperature=-1.0), None, "--temperature is -1.0"),
        (dict(max_tokens_per_row=0), None, "--max-tokens-per-row is 0"),
        (dict(), 0, "--block-size is 0"),
        (dict(input=None), None, "--input is not set"),
        (dict(output=None), None, "--output is not set"),
        (dict(output="in.jsonl"), None, "--output in.jsonl is the file that --input names"),
    ],
)
def test_settings_of_score(changes: dict, block_size: int | None, words: str | None) -> None:
    settings = ScoreConfig(**dict(input="in.jsonl", output="out.jsonl") | changes)
    message = refused(check_score, settings, LOAD, block_size)
    assert message is None if words is None else words in message


@pytest.mark.parametrize(
    "changes, model, words",
    [
        (dict(), ModelConfig(block_size=4), 4),
        (dict(tokens_per_step=4), ModelConfig(block_size=4), 4),
        (dict(tokens_per_step=5), ModelConfig(block_size=4), "--tokens-per-step 5 is more than the 4 tokens"),
        (dict(trace_block_size=8), ModelConfig(block_size=4), "--trace-block-size 8 is for models of full attention"),
        (dict(), ModelConfig(), "Give --block-size."),
        (dict(), ModelConfig(full_attention=True), "Give --trace-block-size."),
        (dict(trace_block_size=8, tokens_per_step=8), ModelConfig(full_attention=True), 8),
        (dict(tokens_per_step=0), None, "--tokens-per-step is 0"),
        (dict(lines_at_once=0), None, "--lines-at-once is 0"),
        (dict(output="in.jsonl"), None, "--output in.jsonl is the file that --input names"),
    ],
)
def test_settings_of_trace(changes: dict, model: ModelConfig | None, words: str | int) -> None:
    settings = TraceConfig(**dict(input="in.jsonl", output="out.jsonl") | changes)
    message = refused(check_trace, settings, LOAD)
    if model is None:
        assert words in message
    elif isinstance(words, int):
        assert message is None and check_trace_of_model(settings, model) == words
    else:
        assert message is None and words in refused(check_trace_of_model, settings, model)


def test_all_need_a_checkpoint() -> None:
    assert "--load is not set" in refused(check_trace, TraceConfig("a", "b"), LoadConfig())
    assert "--load is not set" in refused(check_generate, GenerateConfig(**FILES), LoadConfig())
    assert "--load is not set" in refused(check_score, ScoreConfig("a", "b"), LoadConfig(), None)
