"""`plan`: what it prints and writes, what it refuses and proposes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from megatron_dlm.__main__ import main
from tests.tiny import leave_job

RL = ["plan", "--model-preset", "tiny", "--vocab-size", "512", "--bf16", "--global-batch-size", "32"]
FP8 = "--transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe"
LAYOUT = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    leave_job()
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


def told(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_every_distinct_rank_is_told(capsys):
    code, out, err = told(capsys, *RL, *LAYOUT, "--plan-world-size", 16, "--plan-json", "plan.json")
    assert (code, err) == (0, "")
    assert "Distinct ranks: 4 of 16" in out and "It fits" in out
    figures = json.load(open("plan.json"))
    assert [(rank["tensor"], rank["stage"], rank["alike"]) for rank in figures["ranks"]] == [
        (0, 0, 4), (1, 0, 4), (0, 1, 4), (1, 1, 4),
    ]  # fmt: skip
    for rank in figures["ranks"]:
        assert rank["refit"]["received"] == rank["refit"]["own"] > 0  # the layers of the other stage
        assert rank["peak"]["bytes"] == max(sum(held.values()) for held in rank["phases"].values())
    assert set(figures["step"]) >= {"rollout", "train", "refit"}
    # Weights that are sent are received somewhere.
    total = lambda name: sum(rank["alike"] * rank["refit"][name] for rank in figures["ranks"])
    assert total("sent") == total("received")


def test_replicas_share_the_optimizer(capsys):
    def optimizer(world: int) -> int:
        code, *_ = told(
            capsys, *RL, "--plan-world-size", world, "--plan-json", "plan.json", "--use-distributed-optimizer"
        )
        assert code == 0
        return json.load(open("plan.json"))["ranks"][0]["models"]["policy"]["optimizer"]

    assert optimizer(8) == pytest.approx(optimizer(1) / 8, rel=0.01)


@pytest.mark.parametrize(
    "layout",
    [
        "--context-parallel-size 2",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 "
        "--recompute-granularity selective",
        "--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--rollout-expert-model-parallel-size 1",
        f"{FP8} blockwise --num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 --recompute-granularity "
        "selective --recompute-modules layernorm core_attn --expert-tensor-parallel-size 1",
        f"{FP8} tensorwise --fp8-param-gather --use-distributed-optimizer --first-last-layers-bf16 --use-value-model "
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ],
)
def test_every_layout_can_be_planned(capsys, layout):
    code, out, err = told(capsys, *RL, *layout.split(), "--plan-world-size", 8)
    assert (code, err) == (0, "") and "It fits" in out
    assert ("Transformer Engine" in out) == (FP8 in layout) and "by Triton's kernels" in out


def test_who_sleeps_is_not_there(capsys):
    flags = ["--use-value-model", "--offload-train", "--offload-rollout", "--plan-json", "plan.json"]
    code, *_ = told(capsys, *RL, *flags)
    assert code == 0
    phases = json.load(open("plan.json"))["ranks"][0]["phases"]
    asleep = lambda phase, name: f"{name} gradients and optimizer" not in phases[phase]
    assert asleep("rollout", "policy") and asleep("rollout", "value")
    assert not asleep("train", "policy") and asleep("train", "value")
    assert asleep("train_value", "policy") and not asleep("train_value", "value")
    assert "kv cache" in phases["rollout"] and "kv cache" not in phases["train"]


def test_a_yaml_of_fine_tuning_is_planned_as_such(capsys):
    sections = {
        "model": {"model_preset": "tiny", "vocab_size": 512},
        "sft": {"max_tokens_per_row": 512, "data_path": ["x"]},
    }
    yaml.safe_dump(sections, open("sft.yaml", "w"))
    code, out, _ = told(capsys, "plan", "--config", "sft.yaml")
    assert code == 0 and "kv cache" not in out and "train: " in out


def test_what_does_not_fit_is_refused_with_what_does(capsys):
    yaml.safe_dump({"base": "h100", "memory_bytes": 330e6, "name": "small"}, open("small.yaml", "w"))
    flags = ["--plan-hardware", "small.yaml", "--plan-reserve-gib", 0, "--max-tokens-per-row", 8192]
    flags += ["--kv-cache-gib", 0.02, "--max-running-requests", 8, "--plan-world-size", 8, "--max-tokens-per-pass", 512]
    flags += ["--attention-backend", "dense"]  # with its masks
    code, out, err = told(capsys, *RL, *flags)
    assert code == 2 and "Distinct ranks: 1 of 8" in out  # the table comes first
    assert "does not fit" in err and "What fits" in err and err.count("\n") == 1
    proposed = err.partition("add ")[2].strip().rstrip(".").split()
    code, out, _ = told(capsys, *RL, *flags, *proposed)
    assert code == 0 and "It fits" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--plan-hardware", "z80"], "z80"),
        (
            [*"--plan-hardware a100 --transformer-impl transformer_engine --fp8-format e4m3".split()],
            "no products in FP8",
        ),
        (
            ["--plan-hardware", "h200", *"--transformer-impl transformer_engine --fp8-format e4m3".split()]
            + ["--fp8-recipe", "mxfp8"],
            "mxfp8 needs Blackwell",
        ),
        (
            ["--plan-hardware", "a100", "--rollout-weights", "fp8"],
            "no products in FP8. Leave --rollout-weights fp8 out",
        ),
        (["--plan-hardware", "ours.yaml", "--rollout-weights", "fp8"], "ours.yaml does not say fp8_flops, which"),
        (["--plan-world-size", "0"], "--plan-world-size is 0"),
        (["--plan-world-size", "3", "--tensor-model-parallel-size", "2"], "3 processes cannot be split"),
        (["--plan-tokens-per-step", "0"], "--plan-tokens-per-step is 0"),
        (["--plan-reserve-gib", "1000"], "--plan-reserve-gib 1000"),
        (["--plan-json", "/dev/null/plan.json"], "--plan-json"),
        (["--vocab-size", "512", "--model-preset", "huge"], "huge"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(capsys, flags, says):
    yaml.safe_dump({"base": "a100"}, open("ours.yaml", "w"))
    code, out, err = told(capsys, *RL, *flags)
    assert code == 2 and not out and says in err and err.count("\n") == 1


def test_it_needs_no_device_and_no_launcher(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_dlm", *RL, "--plan-world-size", "1024"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 1,024" in done.stdout
