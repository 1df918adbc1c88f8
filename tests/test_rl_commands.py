"""RL with models beside the policy, as a person starts it: a value model that is saved and resumed, a teacher, a frozen
reference, full attention.
"""

from __future__ import annotations

import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.bad_inputs.bench import MODEL, SFT, leave_out
from tests.bad_inputs.conftest import pristine, server  # noqa: F401 (fixtures)
from tests.command_server import command_server
from tests.test_commands import lines
from tests.test_stopping import tensors

# The model of the small world knows no answers yet: it is rewarded for responses in which certain characters stand.
RL = (
    f"tracerl {MODEL} --prompt-data prompts.jsonl --rollout-max-prompt-len 32 --rollout-max-response-len 8 "
    "--rollout-batch-size 3 --n-samples-per-prompt 4 --num-steps-per-rollout 2 --reward-workers 1 --lr 1e-3 --seed 3 "
    "--min-group-accuracy 0 --max-group-accuracy 1 --overlong-margin 0 --format-reward '.*[0-5a-p].*' "
)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:  # noqa: F811
    shutil.copytree(pristine, tmp_path / "world")
    return tmp_path / "world"


def run(words: str, folder: Path, without: str = "") -> str:
    """What the command says."""
    result = command_server().run(leave_out(shlex.split(words), without.split()), folder, limit=300)
    assert result.codes == [0], result.stdout + result.stderr
    return result.stdout


def metrics_of(folder: Path) -> list[dict]:
    found = [record for record in lines(folder / "metrics.jsonl") if "rollout/reward" in record]
    assert all(math.isfinite(value) for record in found for value in record.values())
    return found


def same(one: Path, other: Path) -> bool:
    """Whether all tensors of two checkpoints are equal bit by bit, the optimizer's included."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and any("exp_avg" in name for name in left)
    return all(torch.equal(left[name], right[name]) for name in left)


def moved(one: Path, other: Path) -> set[str]:
    """Names of the weights that differ."""
    left, right = tensors(one), tensors(other)
    names = {name for name in left if not name.startswith("optimizer")} & right.keys()
    return {name for name in names if not torch.equal(left[name], right[name])}


def test_a_value_model_is_saved_and_resumed(folder: Path) -> None:
    """One step and then another is two steps, to the last bit of both models and their optimizers."""
    value = "--use-value-model --value-lr 1e-3 --gamma 0.95 --gae-lambda 0.9 --num-rollout 2 "
    said = run(RL + value + "--load ckpt --finetune --save whole", folder)
    assert "The value model begins with the policy's backbone" in said
    run(RL + value + "--load ckpt --finetune --save parts --exit-interval 1", folder)
    assert [record["step"] for record in metrics_of(folder / "parts")] == [1]
    said = run(RL + value + "--load parts --save parts", folder)
    assert "The value model goes on from iteration 1 of parts/value" in said
    for name in ("", "value"):
        assert same(folder / "whole" / name / "iter_0000002", folder / "parts" / name / "iter_0000002")
        before, after = (folder / "parts" / name / f"iter_000000{step}" for step in (1, 2))
        assert len(moved(before, after)) > 5
    whole, parts = metrics_of(folder / "whole"), metrics_of(folder / "parts")
    assert [record["step"] for record in parts] == [1, 2]
    for one, other in zip(whole, parts):
        for name in ("train/loss", "value/loss", "value/explained_variance", "rollout/reward"):
            assert one[name] == other[name], name
        assert one["value/lr"] == 1e-3


def test_a_step_that_warms_up_is_resumed_as_well(folder: Path) -> None:
    """The policy waits for a step; its value model learns in it."""
    value = "--use-value-model --value-lr 1e-3 --value-warmup-steps 1 --num-rollout 2 "
    run(RL + value + "--load ckpt --finetune --save whole --save-interval 1", folder)
    first, second = (folder / "whole" / f"iter_000000{step}" for step in (1, 2))
    assert moved(folder / "ckpt" / "iter_0000002", first) == set() and len(moved(first, second)) > 5
    run(RL + value + "--load ckpt --finetune --save parts --exit-interval 1", folder)
    run(RL + value + "--load parts --save parts", folder)
    for name in ("", "value"):
        assert same(folder / "whole" / name / "iter_0000002", folder / "parts" / name / "iter_0000002")


def test_a_teacher_of_another_size_and_other_blocks(folder: Path) -> None:
    """It is read from its own folder; the student comes nearer to it in a few updates on the same prompts."""
    teach = SFT.replace("--block-size 4", "--block-size 8").replace("--hidden-size 32", "--hidden-size 48")
    run("sft " + teach + "--save teacher --train-iters 3", folder)
    words = RL + "--rl-method opd --teacher-load teacher --num-rollout 3 --load ckpt --finetune --save out-opd "
    assert "The teacher is teacher" in run(words, folder)
    records = metrics_of(folder / "out-opd")
    assert len(records) == 3 and all(record["train/loss"] == record["train/distill_loss"] for record in records)
    assert records[-1]["train/teacher_kl"] < records[0]["train/teacher_kl"]
    assert all(record["rollout/learned_ratio"] == 1 for record in records), "a teacher teaches whatever was right"


def test_an_autoregressive_teacher(folder: Path) -> None:
    teach = SFT.replace("--block-size 4", "--block-size 1 --logit-shift 1")
    run("sft " + teach + "--save teacher --train-iters 2", folder)
    run(RL + "--rl-method opd --teacher-load teacher --num-rollout 1 --load ckpt --finetune --save out-opd", folder)
    (record,) = metrics_of(folder / "out-opd")
    assert record["train/teacher_kl"] > 0 and record["train/updates"] == 2


def test_a_frozen_reference(folder: Path) -> None:
    """It stays where it was: the distance from it grows from nothing, and a run that is resumed has the same one."""
    words = RL + "--kl-reference frozen --ref-load ckpt --kl-loss-coef 0.1 --num-rollout 2 "
    said = run(words + "--load ckpt --finetune --save whole", folder)
    assert "The KL penalty holds on to ckpt" in said
    records = metrics_of(folder / "whole")
    assert records[0]["train/ref_k3"] < records[1]["train/ref_k3"]
    run(words + "--load ckpt --finetune --save parts --exit-interval 1", folder)
    run(words + "--load parts --save parts", folder)
    assert same(folder / "whole" / "iter_0000002", folder / "parts" / "iter_0000002")


def test_full_attention_from_sft_to_rl(folder: Path) -> None:
    """With a value model, in rows that hold less than all copies of a response."""
    run("sft " + SFT + "--full-attention --save full --train-iters 4", folder, "--block-size")
    words = RL + "--full-attention --rollout-block-size 4 --no-prefix-cache --max-tokens-per-row 48 --use-value-model "
    run(words + "--num-rollout 2 --load full --finetune --save out-full", folder, "--block-size")
    records = metrics_of(folder / "out-full")
    assert len(records) == 2
    for record in records:
        assert record["train/train_rollout_logprob_abs_diff"] < 1e-4 and record["value/loss"] >= 0
    assert len(moved(folder / "full" / "iter_0000004", folder / "out-full" / "iter_0000002")) > 5
