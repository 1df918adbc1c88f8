"""How `tracerl` puts a run together: who sleeps, what memory is spoken for, how long schedules are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.value import ValueConfig
from tests.harness import pool
from tests.tiny import make_session


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("rollout", [False, True])
def test_the_policy_sleeps_before_the_value_model_is_made(train: bool, rollout: bool, monkeypatch) -> None:
    """Where the KV cache takes turns with both: at no time does the device hold the optimizers of the two."""
    from megatron_dlm.commands.models import open_models
    from megatron_dlm.training.setup import Session
    from megatron_dlm.training.sleep import asleep

    session, original, found = make_session(), Session.value_state, []
    policy = session.train_state(OptimizerConfig(), 9)

    def value_state(*args):
        found.append(asleep(policy))
        return original(*args)

    monkeypatch.setattr(Session, "value_state", value_state)
    config = {
        "rl": RLConfig(offload_train=train, offload_rollout=rollout),
        "value": ValueConfig(use_value_model=True),
        "optimizer": OptimizerConfig(),
        "checkpoint": CheckpointConfig(),
    }
    models = open_models(config, session, policy, 2, {}, lambda line: None)
    both = train and rollout
    assert found == [both] and asleep(models.policy) == asleep(models.value) == both
    there = dict(policy.named_parameters())
    assert all(name == "value_head.weight" or one.equal(there[name]) for name, one in models.value.named_parameters())


class Opened(Exception):
    """The run has come to its rollout engine."""


def opened(flags: list[str]) -> tuple[int, int, int]:
    """Run the command up to its engine: the memory that is spoken for then, numbers in the value model, and the length
    of the policy's schedule."""
    from megatron_dlm.commands import tracerl
    from megatron_dlm.rollout.rig import RolloutRig

    models, original = [], tracerl.open_models
    asked = {}

    def open_models(*args):
        models.append(original(*args))
        return models[0]

    def open_rig(session, state, rollout, longest_prompt, longest_response, spoken_for=0):
        asked["spoken_for"] = spoken_for
        raise Opened

    tracerl.open_models, RolloutRig.open, before = open_models, open_rig, RolloutRig.open
    try:
        tracerl.main(flags)
    except Opened:
        pass
    finally:
        tracerl.open_models, RolloutRig.open = original, before
    policy, value = models[0].policy, models[0].value
    count = 0 if value is None else sum(parameter.numel() for _, parameter in value.named_parameters())
    return asked["spoken_for"], count, policy.scheduler.lr_decay_steps


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    from megatron_dlm.data.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tracerl")
    prompts = [{"question": f"{a}+1=", "ground_truth_answer": str(a + 1)} for a in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    train_tokenizer([record["question"] for record in prompts], 270, folder / "tokenizer", [])
    words = "--num-layers 1 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2"
    words += " --block-size 4 --max-position-embeddings 256 --rotary-base 10000 --rollout-max-prompt-len 64"
    words += " --rollout-max-response-len 8 --rollout-batch-size 8 --n-samples-per-prompt 4"
    words += " --num-steps-per-rollout 2 --num-rollout 10"
    data = ["--tokenizer-model", str(folder / "tokenizer"), "--prompt-data", str(folder / "prompts.jsonl")]
    return [*words.split(), *data]


@pytest.mark.parametrize(
    ("more", "moments", "updates"),
    [
        ("", 0, 20),
        ("--use-value-model --value-warmup-steps 3", 2, 14),
        ("--use-value-model --offload-train --offload-rollout", 0, 20),  # asleep, nobody takes them from the cache
    ],
)
def test_what_the_engine_and_the_schedule_are_told(flags, more: str, moments: int, updates: int) -> None:
    spoken_for, count, length = pool(1).run(opened, [*flags, *more.split()])[0]
    assert spoken_for == moments * 4 * count and length == updates
    assert (count > 0) == bool(more)


def prompts(**counts: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(source=source) for source, count in counts.items() for _ in range(count)]


def test_a_step_has_no_more_prompts_than_there_are() -> None:
    from megatron_dlm.commands.tracerl import check_prompts

    rl, plain = RLConfig(prompt_data=["a", "b"]), CurriculumConfig()
    weighed = CurriculumConfig(prompt_weights=[1.0, 1.0])
    check_prompts(prompts(a=15, b=5), rl, RolloutConfig(rollout_batch_size=20), plain)
    with pytest.raises(ConfigError, match="--rollout-batch-size 21 is more than the 20 prompts"):
        check_prompts(prompts(a=15, b=5), rl, RolloutConfig(rollout_batch_size=21), plain)
    over = RolloutConfig(rollout_batch_size=10, over_sampling_batch_size=21)
    with pytest.raises(ConfigError, match="--over-sampling-batch-size 21 is more than the 20 prompts"):
        check_prompts(prompts(a=15, b=5), rl, over, plain)
    check_prompts(prompts(a=15, b=5), rl, RolloutConfig(rollout_batch_size=10), weighed)
    over = RolloutConfig(rollout_batch_size=10, over_sampling_batch_size=12)
    with pytest.raises(ConfigError, match=r"6 of the 12 prompts .*\(--over-sampling-batch-size\) come from b"):
        check_prompts(prompts(a=15, b=5), rl, over, weighed)
