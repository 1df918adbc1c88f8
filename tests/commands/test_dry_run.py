"""--dry-run: what it says, what it refuses, and that it needs nothing."""

from __future__ import annotations

import math

import pytest
import yaml

from megatron_dlm.__main__ import main
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.train_tokenizer import train_tokenizer

TINY = ["--model-preset", "tiny", "--tokenizer-model", "tokenizer"]
SFT = ["sft", "--dry-run", *TINY, "--data-path", "sft.jsonl"]
RL = ["tracerl", "--dry-run", *TINY, "--prompt-data", "prompts.jsonl", "--global-batch-size", "100"]


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def said(capsys, *argv: object) -> str:
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refusal(capsys, *argv: object) -> str:
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1
    return err


def test_names_what_is_not_here_and_leaves_nothing(capsys, tmp_path) -> None:
    out = said(capsys, *RL, "--save", "runs/x", "--eval-prompt-data", "held.jsonl", "--eval-interval", 5)
    assert "Not here: tokenizer (--tokenizer-model), prompts.jsonl (--prompt-data), held.jsonl" in out
    assert "Here:" not in out and not list(tmp_path.iterdir())


def test_what_is_here_tells_about_the_vocabulary(capsys, tmp_path) -> None:
    assert "787,840 parameters besides those of its unknown vocabulary" in said(capsys, *SFT)
    train_tokenizer(["one two three"], 300, tmp_path / "tokenizer")
    (tmp_path / "sft.jsonl").write_text("not even JSON")
    out = said(capsys, *SFT)
    assert "Here: tokenizer (--tokenizer-model), sft.jsonl (--data-path)." in out
    vocabulary = Tokenizer(str(tmp_path / "tokenizer")).vocab_size
    tables = 2 * 128 * 128 * math.ceil(vocabulary / 128)  # the embedding and the head
    assert f"Model: {787_840 + tables:,} parameters; 4 layers" in out


def test_prints_settings_that_can_be_read_back(capsys, tmp_path) -> None:
    words = 'Think.\n"{question}"\nAnswer: \\boxed{}'
    flags = ["--rl-method", "dipo", "--prompt-template", words]
    out = said(capsys, *RL, "--lr", "3e-6", "--rollout-max-response-len", 100, *flags)
    indented = [line[2:] for line in out.splitlines() if line.startswith("  ")]
    settings = yaml.safe_load("\n".join(indented))
    assert settings["optimizer"] == {"lr": 3e-6} and settings["rollout"] == {"rollout_max_response_len": 100}
    assert settings["tokenizer"] == {"tokenizer_model": "tokenizer", "prompt_template": words}
    assert settings["rl"] == {"prompt_data": ["prompts.jsonl"], "global_batch_size": 100, "rl_method": "dipo"}
    assert "\nBy --rl-method dipo: " in out and "loss_aggregation token, normalize_advantages_by_std False" in out
    assert "run" not in settings and "eval" not in settings
    (tmp_path / "again.yaml").write_text("\n".join(indented))
    again = said(capsys, "tracerl", "--dry-run", "--config", "again.yaml")
    assert again == out


@pytest.mark.parametrize(
    "flags, environment, layout",
    [
        ([], {}, "1 process = tensor 1 x pipeline 1 x data 1; 1 rollout engine of 1 process."),
        ([], {"WORLD_SIZE": "6"}, "6 processes = tensor 1 x pipeline 1 x data 6; 6 rollout engines of 1 process."),
        (
            ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2],
            {},
            "4 processes = tensor 2 x pipeline 2 x data 1; 2 rollout engines of 2 processes.",
        ),
        (
            ["--rollout-tensor-model-parallel-size", 2, "--dry-run-world-size", 8],
            {"WORLD_SIZE": "6"},
            "8 processes = tensor 1 x pipeline 1 x data 8; 4 rollout engines of 2 processes.",
        ),
    ],
)
def test_layout(capsys, monkeypatch, flags, environment, layout) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert f"Layout: {layout}" in said(capsys, *RL, *flags)


def test_updates_of_a_step(capsys) -> None:
    plain = ["--rollout-batch-size", 7, "--n-samples-per-prompt", 30, "--num-rollout", 9]
    assert "= 210 responses of up to 256 tokens; up to 3 updates of 100 responses" in said(capsys, *RL, *plain)
    split = [*RL[:-2], "--num-steps-per-rollout", 4]
    out = said(capsys, *split, *plain)
    assert "up to 4 updates of 53 responses" in out and "In all up to 36 updates." in out
    assert "30 updates of 128 samples" in said(capsys, *SFT, "--train-iters", 30)


def test_only_the_first_rank_speaks(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert said(capsys, *SFT) == ""


def test_a_checkpoint_elsewhere_may_hold_the_sizes(capsys) -> None:
    flags = ["--prompt-data", "p.jsonl", "--global-batch-size", 8, "--hf-checkpoint", "checkpoints/4b"]
    out = said(capsys, "tracerl", "--dry-run", *flags)
    assert "Model: unknown until checkpoints/4b is here" in out and "Not here: checkpoints/4b (--hf-checkpoint)" in out


@pytest.mark.parametrize(
    "argv, words",
    [
        ([*RL, "--lr", -1], "--lr is -1.0"),
        ([*RL, "--tensor-model-parallel-size", 3], "--tensor-model-parallel-size 3 does not divide"),
        ([*RL, "--tensor-model-parallel-size", 2, "--dry-run-world-size", 5], "5 processes cannot be split"),
        ([*RL, "--rollout-tensor-model-parallel-size", 2, "--dry-run-world-size", 3], "3 processes cannot be split"),
        ([*RL, "--num-steps-per-rollout", 2], "both are given"),
        (RL[:-2], "neither is given"),
        ([*RL, "--global-batch-size", 0], "--global-batch-size is 0"),
        ([*RL, "--shrinkage", 0], "--shrinkage is 0"),
        ([*RL, "--lr-warmup-iters", 1100], "leaves nothing of the run, 1100 steps"),
        ([*RL, "--use-value-model", "--value-lr-warmup-iters", 1100], "leaves nothing of the updates of the value"),
        ([*RL, "--rollout-max-response-len", 4000], "this model has 2048"),
        ([*RL, "--transformer-override", "recompute_granularity=full"], "needs --recompute-method"),
        (
            [*RL, "--transformer-override", "fine_grained_activation_offloading=true"],
            "megatron-core refuses this model",
        ),
        ([*RL, "--fp64"], "--fp64 does not work in training"),
        ([*RL, "--use-distributed-optimizer", "--optimizer", "sgd"], "works with --optimizer adam only"),
        ([*RL, "--load", "a", "--hf-checkpoint", "b", "--finetune"], "both name weights"),
        (["tracerl", "--dry-run", "--model-preset", "tiny", "--prompt-data", "p"], "--tokenizer-model is not set"),
        ([*RL, "--metrics-jsonl", "prompts.jsonl"], "is the file that --prompt-data names"),
        ([*SFT, "--max-mask-ratio", 0.2, "--min-mask-ratio", 0.3], "is above --max-mask-ratio 0.2"),
        ([*SFT, "--dry-run-world-size", 0], "--dry-run-world-size is 0"),
        (["sft", *SFT[2:], "--dry-run-world-size", 2], "--dry-run-world-size needs --dry-run"),
    ],
)
def test_refuses_what_a_run_refuses(capsys, argv, words) -> None:
    assert words in refusal(capsys, *argv)
