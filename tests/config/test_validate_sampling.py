"""Every refusal of sampling settings that rollouts, evaluation and generate share, and what must pass."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig, RolloutConfig
from megatron_dlm.config.validate_sampling import (
    check_decoding_block,
    check_steps_of_block,
    check_unmasking,
    check_window,
)

BLOCKS, FULL = ModelConfig(block_size=4), ModelConfig(full_attention=True)


def refused(check, *arguments) -> str | None:
    """The message of the refusal, or None when the check passes."""
    try:
        check(*arguments)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        return str(error)
    return None


@pytest.mark.parametrize("config, prefix", [(RolloutConfig, ""), (GenerateConfig, ""), (EvalConfig, "eval_")])
@pytest.mark.parametrize(
    "values, ways, words",
    [
        (dict(), ["dynamic"], None),
        (dict(threshold=1.0), ["dynamic"], None),
        (dict(threshold=0.0), ["dynamic"], "threshold is 0.0. Use a value above 0 to 1."),
        (dict(threshold=0.0), ["static"], "threshold is 0.0"),
        (dict(threshold=1.1, confidence="margin"), ["dynamic"], "threshold is 1.1"),
        (dict(threshold=-0.2, confidence="untempered"), ["dynamic"], "threshold is -0.2"),
        (dict(entropy_bound=0.0), ["entropy_bounded"], "entropy-bound is 0.0. Use a value above 0."),
        (dict(entropy_bound=-1.0), ["static"], "entropy-bound is -1.0"),
        (dict(entropy_bound=20.0), ["entropy_bounded", "static"], None),
        (dict(confidence="entropy"), ["static", "entropy_bounded"], None),
        (dict(confidence="entropy"), ["static", "dynamic"], "threshold is 0.9, which"),
        (dict(confidence="entropy", threshold=0.0), ["dynamic"], "Use a value below 0."),
        (dict(confidence="entropy", threshold=-0.1), ["dynamic"], None),
        (dict(confidence="entropy", threshold=-0.1), ["static"], "threshold is -0.1"),
    ],
)
def test_unmasking(config, prefix: str, values: dict, ways: list[str], words: str | None) -> None:
    settings = config(**{prefix + name: value for name, value in values.items()})
    message = refused(check_unmasking, settings, ways, prefix)
    assert message is None if words is None else words in message
    assert message is None or message.startswith("--eval-" if prefix else "--")


@pytest.mark.parametrize("config", [EngineConfig, RolloutConfig, GenerateConfig])
@pytest.mark.parametrize(
    "values, model, words",
    [
        (dict(), BLOCKS, None),
        (dict(), FULL, None),
        (dict(horizon=0, prefix_cache=False), FULL, None),
        (dict(horizon=-1), FULL, "--horizon is -1"),
        (dict(horizon=8), BLOCKS, "--horizon 8 is for models of full attention"),
        (dict(horizon=0), BLOCKS, "--horizon 0 is for models of full attention"),
        (dict(prefix_cache=False), BLOCKS, "--no-prefix-cache is for models of full attention"),
    ],
)
def test_window(config, values: dict, model: ModelConfig, words: str | None) -> None:
    message = refused(check_window, config(**values), model)
    assert message is None if words is None else words in message


def test_decoding_block() -> None:
    assert check_decoding_block(None, BLOCKS) == 4
    assert check_decoding_block(8, BLOCKS) == check_decoding_block(8, FULL) == 8
    assert refused(check_decoding_block, None, ModelConfig()).endswith("Give --block-size or --rollout-block-size.")
    assert refused(check_decoding_block, None, FULL).endswith("Give --rollout-block-size.")


@pytest.mark.parametrize("steps, passes", [(None, True), (1, True), (4, True), (5, False)])
def test_steps_of_a_block(steps: int | None, passes: bool) -> None:
    message = refused(check_steps_of_block, steps, 4, "--eval-denoising-steps")
    assert (message is None) == passes and (passes or "--eval-denoising-steps 5 is more than the 4 tokens" in message)
