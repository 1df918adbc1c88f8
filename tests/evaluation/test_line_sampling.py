"""The settings of one line of prompts: what it names beats the flags, and nothing unknown or impossible passes."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.evaluation.line_sampling import FIELDS, sampling_of_line, sampling_params
from tests.diffusion.oracles import MASK_ID
from tests.tiny import EOS_ID, Words

BLOCKS, FULL = ModelConfig(block_size=4), ModelConfig(full_attention=True)
FLAGS = GenerateConfig(max_new_tokens=12, top_k=9, temperature=0.5)


def of_line(asked: object, flags: GenerateConfig = FLAGS, model: ModelConfig = BLOCKS) -> SamplingParams:
    return sampling_of_line(asked, "f.jsonl, line 3", flags, model, Words())


def test_the_flags_are_complete() -> None:
    flags = GenerateConfig(**dict.fromkeys(()), confidence="margin", entropy_bound=0.7, threshold=0.4)
    found = sampling_params(flags, BLOCKS, Words())
    assert found == SamplingParams(
        confidence="margin", entropy_bound=0.7, threshold=0.4, stop_token_ids=(EOS_ID,), block_size=4
    )
    window = dataclasses.replace(flags, prefix_cache=False, horizon=5, rollout_block_size=6, denoising_steps=2)
    found = sampling_params(window, FULL, Words())
    assert (found.prefix_cache, found.horizon, found.block_size, found.denoising_steps) == (False, 5, 6, 2)


def test_a_line_without_wishes_is_sampled_by_the_flags() -> None:
    assert of_line(None) == of_line({}) == sampling_params(FLAGS, BLOCKS, Words())


@pytest.mark.parametrize(
    "asked, expected",
    [
        (dict(temperature=0), dict(temperature=0.0)),
        (dict(top_k=3, top_p=0.5), dict(top_k=3, top_p=0.5)),
        (dict(max_new_tokens=7), dict(max_new_tokens=7)),
        (dict(block_size=8), dict(block_size=8, denoising_steps=8)),
        (dict(block_size=8, denoising_steps=3), dict(block_size=8, denoising_steps=3)),
        (dict(denoising_steps=2), dict(denoising_steps=2)),
        (dict(remasking="entropy_bounded", entropy_bound=2), dict(remasking="entropy_bounded", entropy_bound=2.0)),
        (
            dict(confidence="entropy", threshold=-0.3),
            dict(confidence="entropy", threshold=-0.3),
        ),
        (dict(stop_token_ids=[]), dict(stop_token_ids=())),
        (dict(stop_token_ids=[3, 4], ignore_eos=True), dict(stop_token_ids=(3, 4), ignore_eos=True)),
    ],
)
def test_what_a_line_names_beats_the_flags(asked: dict, expected: dict) -> None:
    assert of_line(asked) == dataclasses.replace(sampling_params(FLAGS, BLOCKS, Words()), **expected)


def test_every_setting_of_a_line_is_one_of_the_command() -> None:
    assert set(FIELDS.values()) <= {field.name for field in dataclasses.fields(GenerateConfig)}
    assert set(FIELDS) <= {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    "asked, words",
    [
        (0.5, "'sampling' is not an object"),
        (["temperature"], "'sampling' is not an object"),
        (dict(temprature=1), "holds 'temprature', which is no setting of a line. Did you mean temperature?"),
        (dict(seed=1), "holds 'seed', which is no setting of a line. Use temperature, top_k,"),
        (dict(rollout_block_size=4), "'rollout_block_size'"),
        (dict(horizon=4), "'horizon'"),
        (dict(temperature="hot"), "'temperature' of 'sampling' needs"),
        (dict(temperature=None), "'temperature' of 'sampling' needs"),
        (dict(temperature=-1), "'temperature' is -1.0"),
        (dict(temperature=1e-300), "'temperature' is 1e-300"),
        (dict(top_k=1.5), "'top_k' of 'sampling' needs a whole number"),
        (dict(top_k=-1), "'top_k' is -1"),
        (dict(top_k=True), "'top_k' of 'sampling' needs a whole number"),
        (dict(top_p=0), "'top_p' is 0.0"),
        (dict(max_new_tokens=0), "'max_new_tokens' is 0"),
        (dict(block_size=0), "'block_size' is 0"),
        (dict(denoising_steps=5), "'denoising_steps' 5 is more than the 4 tokens"),
        (dict(block_size=2, denoising_steps=3), "'denoising_steps' 3 is more than the 2 tokens"),
        (dict(remasking="random"), "'remasking' of 'sampling' needs static, dynamic, sequential or entropy_bounded"),
        (dict(threshold=2), "'threshold' is 2.0"),
        (dict(confidence="entropy"), "'threshold' is 0.9, which 'confidence' entropy never passes"),
        (dict(entropy_bound=0), "'entropy_bound' is 0.0"),
        (dict(stop_token_ids=3), "'stop_token_ids' of 'sampling' needs a list"),
        (dict(stop_token_ids=[10**6]), "'stop_token_ids' 1000000 is not a token"),
        (dict(stop_token_ids=[MASK_ID]), f"'stop_token_ids' {MASK_ID} is the mask"),
        (dict(ignore_eos=1), "'ignore_eos' of 'sampling' needs true or false"),
    ],
)
def test_what_cannot_work_is_refused_by_file_and_line(asked: object, words: str) -> None:
    with pytest.raises(DataError) as error:
        of_line(asked)
    message = str(error.value)
    assert message.startswith("f.jsonl, line 3: ") and words in message and "--" not in message
    assert "\n" not in message and message.endswith((".", "?"))


def test_flags_that_do_not_go_with_the_model_are_no_lines_fault() -> None:
    for flags, words in (
        (GenerateConfig(horizon=3), "--horizon 3"),
        (GenerateConfig(denoising_steps=5), "--denoising-steps 5"),
        (GenerateConfig(stop_token_ids=[MASK_ID]), f"--stop-token-ids {MASK_ID}"),
    ):
        with pytest.raises(ConfigError, match=words):
            sampling_params(flags, BLOCKS, Words())
    with pytest.raises(ConfigError, match="--rollout-block-size"):
        sampling_params(GenerateConfig(), FULL, Words())
