"""A model with experts as a person starts it, on two processes that share them: from fine-tuning to responses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.bad_inputs.bench import LENGTHS, MODEL
from tests.bad_inputs.conftest import pristine, server  # noqa: F401 (fixtures)
from tests.command_server import command_server
from tests.test_commands import lines

EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 "
SHARED = "--expert-model-parallel-size 2 "


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory) -> Path:  # noqa: F811
    """With a checkpoint of a model with experts, trained on two processes that recompute what they can."""
    world = tmp_path_factory.mktemp("experts") / "world"
    shutil.copytree(pristine, world)
    train = f"sft {MODEL} {EXPERTS} {SHARED} --data-path sft.jsonl --train-iters 2 --global-batch-size 4 --save moe "
    run(train + "--recompute-granularity selective --recompute-modules core_attn layernorm moe", world, 2)
    return world


def run(words: str, folder: Path, ranks: int) -> str:
    """What the command says."""
    result = command_server().run(shlex.split(words), folder, ranks=ranks, limit=300)
    assert set(result.codes) == {0}, result.stdout + result.stderr
    return result.stdout


def test_generate_shares_experts(folder: Path) -> None:
    generate = "generate --load moe --prompts prompts.jsonl --max-new-tokens 8 --fp64 --temperature 1 "
    run(generate + "--output one.jsonl", folder, 1)
    run(generate + SHARED + "--output two.jsonl", folder, 2)
    one, two = lines(folder / "one.jsonl"), lines(folder / "two.jsonl")
    wanted = ("index", "sample", "token_ids", "step_map")
    assert len(one) > 4 and [[line[name] for name in wanted] for line in one] == [
        [line[name] for name in wanted] for line in two
    ]


def test_evaluate_shares_experts(folder: Path) -> None:
    evaluate = f"evaluate --load moe --fp64 {LENGTHS} --eval-prompt-data prompts.jsonl --eval-num-prompts 5 "
    evaluate += "--reward-workers 1 --eval-remasking dynamic static "
    run(evaluate + "--metrics-jsonl one-eval.jsonl", folder, 1)
    for number, own in enumerate(("", "--rollout-expert-model-parallel-size 1")):
        run(f"{evaluate} {SHARED} {own} --metrics-jsonl two-eval-{number}.jsonl", folder, 2)
        (one,), (two,) = lines(folder / "one-eval.jsonl"), lines(folder / f"two-eval-{number}.jsonl")
        names = [name for name in one if name.startswith("eval/")]
        assert names and all(one[name] == pytest.approx(two[name]) for name in names)


def test_tracerl_shares_experts(folder: Path) -> None:
    """In training and in the engines, with experts that stay where they are; the step is that of one process."""
    train = (
        f"tracerl --load moe --finetune {LENGTHS} --prompt-data prompts.jsonl --num-rollout 1 --rollout-batch-size 3 "
    )
    train += "--n-samples-per-prompt 4 --num-steps-per-rollout 1 --reward-workers 1 --lr 1e-3 --seed 3 --verify-refit "
    train += "--min-group-accuracy 0 --max-group-accuracy 1 --overlong-margin 0 --format-reward '.*[0-5a-p].*' "
    run(train + "--save rl-one", folder, 1)
    run(train + SHARED + "--save rl-two", folder, 2)
    found = [json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("rl-one", "rl-two")]
    assert found[1]["perf/refit_bytes"] == 0 and found[1]["rollout/reward"] == pytest.approx(found[0]["rollout/reward"])
    assert found[1]["train/grad_norm"] == pytest.approx(found[0]["train/grad_norm"], rel=1e-3)
