"""The commands as a person starts them: one small run from data to a better model, and mistakes told in a sentence."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_dlm.config import yaml_file
from megatron_dlm.data.train_tokenizer import train_tokenizer
from tests.command_server import command_server
from tests.training.test_sinks import events

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --block-size 4 "
    "--max-position-embeddings 2048 --init-method-std 0.2 --rotary-base 10000"
).split()


def command(*words: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run `megatron-dlm ...` in a process of its own."""
    result = command_server().run([str(word) for word in words], ROOT, environment=environment, limit=300)
    assert result.codes == [expect], result.stdout + result.stderr
    return subprocess.CompletedProcess(words, result.codes[0], result.stdout, result.stderr)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sums of two digits, a tokenizer, and a short fine-tuning run on them."""
    folder = tmp_path_factory.mktemp("commands")
    pairs = [(a, b) for a in range(10) for b in range(10)]
    sft = [{"question": f"{a}+{b}=", "response": f"\\boxed{{{a + b}}}"} for a, b in pairs]
    prompts = [{"question": f"{a}+{b}=", "ground_truth_answer": str(a + b)} for a, b in pairs]
    (folder / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sft))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    train_tokenizer(
        [record["question"] + record["response"] for record in sft], 270, folder / "tokenizer", ["\\boxed{", "}"]
    )
    return folder


@pytest.fixture(scope="module")
def trained(data) -> tuple[Path, subprocess.CompletedProcess]:
    result = command(
        "sft",
        *MODEL,
        "--tokenizer-model",
        data / "tokenizer",
        "--data-path",
        data / "sft.jsonl",
        "--train-iters",
        60,
        "--global-batch-size",
        32,
        "--lr",
        5e-3,
        "--save",
        data / "ckpt",
        "--log-interval",
        20,
        "--metrics-jsonl",
        data / "sft-metrics.jsonl",
        "--seed",
        1,
    )
    return data, result


def test_sft_learns_logs_and_saves(trained) -> None:
    data, result = trained
    records = lines(data / "sft-metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 61))
    assert records[-1]["train/nll"] < 0.5 * records[0]["train/nll"]
    assert "iteration       20/      60" in result.stdout and "lm loss" in result.stdout
    assert (data / "ckpt" / "latest_checkpointed_iteration.txt").read_text().strip() == "60"
    assert (data / "ckpt" / "iter_0000060").is_dir()
    assert imread(data / "ckpt" / "curves.png").std() > 0 and f"Curves: {data / 'ckpt' / 'curves.png'}" in result.stdout
    assert yaml_file.load(data / "ckpt" / "config.yaml")["sft"]["train_iters"] == 60
    assert "100 samples (left out: 0 longer than 2048 tokens)" in result.stdout


def test_a_finished_run_has_nothing_left_to_do(trained) -> None:
    data, _ = trained
    marker = data / "ckpt" / "iter_0000060" / ".metadata"
    before = marker.stat().st_mtime_ns
    flags = ["--tokenizer-model", data / "tokenizer", "--data-path", data / "sft.jsonl", "--train-iters", 60]
    result = command("sft", *MODEL, *flags, "--load", data / "ckpt", "--save", data / "ckpt")
    assert "Nothing left to do: iteration 60 of 60." in result.stdout and "Saved" not in result.stdout
    assert marker.stat().st_mtime_ns == before


def test_a_dry_run_knows_what_a_checkpoint_says(trained) -> None:
    data, _ = trained
    before = sorted(data.rglob("*"))
    flags = ["--finetune", "--prompt-data", data / "prompts.jsonl", "--global-batch-size", 64, "--save", data / "new"]
    result = command("tracerl", "--load", data / "ckpt", *flags, "--dry-run")
    assert "2 layers of width 32, 4 heads in 2 groups; attention block 4; fp32." in result.stdout
    assert f"Here: {data / 'ckpt'} (--load), {data / 'prompts.jsonl'} (--prompt-data)." in result.stdout
    assert "Not here" not in result.stdout and "unknown" not in result.stdout and not result.stderr
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["tracerl", "--load", "{data}/ckpt"], "ckpt was written by sft, and this is tracerl. Add --finetune"),
        (["tracerl", "--load", "{data}/ckpt", "--finetune", "--rotary-base", "1e6"], "has --rotary-base 10000.0"),
        (["evaluate", "--load", "{data}/ckpt", "--block-size", "8"], "has --block-size 4"),
        (["evaluate", "--load", "{data}/ckpt", "--stop-token-ids", "100000"], "--stop-token-ids 100000 is not a token"),
        (["evaluate", "--load", "{data}/ckpt", "--reward", "reasoning_gym"], "--reward reasoning_gym judges only"),
        (["evaluate", "--load", "{data}/ckpt", "--max-running-requests", "0"], "--max-running-requests is 0"),
        (["evaluate", "--load", "{data}/ckpt", "--metrics-jsonl", "/dev/null/x"], "--metrics-jsonl /dev/null/x cannot"),
        (["sft", "--save", "/dev/null/x"], "--save /dev/null/x cannot be written to"),
        (["sft", "--wandb-project", "p", "--wandb-save-dir", "/dev/null/x"], "--wandb-save-dir /dev/null/x cannot be"),
        (["sft", "--wandb-project", "p"], "Run wandb login, or set WANDB_MODE=offline."),
        (["sft", "--tensorboard-dir", "/dev/null/x"], "--tensorboard-dir /dev/null/x cannot be written to"),
        (["evaluate", "--load", "{data}/ckpt", "--save-eval-samples", "/dev/null/x"], "samples /dev/null/x cannot be"),
        (["tracerl", "--save-debug-rollout-data", "/dev/null/x"], "--save-debug-rollout-data /dev/null/x cannot be"),
    ],
)
def test_a_mistake_that_is_found_before_anything_is_trained(trained, words: list[str], sentence: str) -> None:
    data, _ = trained
    source = {
        "sft": ["--data-path", data / "sft.jsonl", "--train-iters", 1],
        "tracerl": ["--prompt-data", data / "prompts.jsonl", "--num-steps-per-rollout", 1, "--rollout-batch-size", 8],
        "evaluate": ["--eval-prompt-data", data / "prompts.jsonl"],
    }[words[0]]
    words = [word.format(data=data) for word in words]
    nobody = {"HOME": str(data), "WANDB_API_KEY": "", "NETRC": str(data / "netrc"), "WANDB_CONFIG_DIR": str(data)}
    result = command(words[0], *MODEL, "--tokenizer-model", data / "tokenizer", *source, *words[1:], expect=2, **nobody)
    message = result.stderr.strip().splitlines()[-1]
    assert sentence in message and "Traceback" not in result.stderr, result.stderr


def test_evaluate_prints_a_table(trained) -> None:
    data, _ = trained
    result = command(
        "evaluate",
        *MODEL,
        "--tokenizer-model",
        data / "tokenizer",
        "--load",
        data / "ckpt",
        "--eval-prompt-data",
        data / "prompts.jsonl",
        "--eval-num-prompts",
        20,
        "--eval-remasking",
        "dynamic",
        "static",
        "--rollout-max-response-len",
        12,
        "--rollout-max-prompt-len",
        32,
        "--metrics-jsonl",
        data / "eval.jsonl",
        "--save-eval-samples",
        data / "eval-samples.jsonl",
        "--reward-workers",
        1,
    )
    (record,) = lines(data / "eval.jsonl")
    assert record["step"] == 60
    for way in ("dynamic", "static"):
        assert record[f"eval/{way}/responses"] == 20 and 0 <= record[f"eval/{way}/accuracy"] <= 1
    shown = [line.split() for line in result.stdout.splitlines() if line.startswith("ckpt")]
    assert [row[1] for row in shown] == ["dynamic", "static"]
    samples = lines(data / "eval-samples.jsonl")
    assert [line["unmasking"] for line in samples] == ["dynamic"] * 20 + ["static"] * 20
    assert {line["step"] for line in samples} == {60} and samples[0]["question"] == "0+0="
    assert sum(line["correct"] for line in samples[:20]) == pytest.approx(20 * record["eval/dynamic/accuracy"])
    assert not (data / "eval.png").exists()
    assert float(shown[0][2].rstrip("%")) == pytest.approx(100 * record["eval/dynamic/accuracy"], abs=0.051)


def test_tracerl_runs_and_resumes(trained) -> None:
    """Two steps with wandb offline and an evaluation, from the checkpoint; then a third from what was saved."""
    data, _ = trained
    flags = [
        *MODEL,
        "--tokenizer-model",
        data / "tokenizer",
        "--prompt-data",
        data / "prompts.jsonl",
        "--rollout-batch-size",
        8,
        "--n-samples-per-prompt",
        8,
        "--rollout-max-response-len",
        16,
        "--rollout-max-prompt-len",
        32,
        "--num-steps-per-rollout",
        2,
        "--max-group-accuracy",
        1.0,
        "--min-group-accuracy",
        0.0,
        "--lr",
        1e-4,
        "--save",
        data / "rl",
        "--tensorboard-dir",
        data / "events",
        "--reward-workers",
        1,
    ]
    command(
        "tracerl",
        *flags,
        "--num-rollout",
        2,
        "--load",
        data / "ckpt",
        "--finetune",
        "--eval-prompt-data",
        data / "prompts.jsonl",
        "--eval-interval",
        2,
        "--eval-num-prompts",
        8,
        "--wandb-project",
        "test",
        "--wandb-save-dir",
        data / "wandb",
        WANDB_MODE="offline",
    )
    metrics = data / "rl" / "metrics.jsonl"
    records = {record["step"]: record for record in lines(metrics) if "rollout/reward" in record}
    assert sorted(records) == [1, 2]
    learned = [record for record in records.values() if record["rollout/learned_ratio"] > 0]
    assert learned, "no group had right and wrong answers"
    for record in records.values():
        assert all(math.isfinite(value) for value in record.values())
        assert 0 <= record["rollout/reward"] <= record["rollout/raw_reward"] <= 1
    for record in learned:
        assert record["train/train_rollout_logprob_abs_diff"] < 1e-4 and record["train/updates"] == 2
    assert any("eval/dynamic/accuracy" in record for record in lines(metrics))
    assert list((data / "wandb").glob("wandb/offline-run-*/*.wandb"))
    command("tracerl", *flags, "--num-rollout", 3, "--load", data / "rl")
    assert [record["step"] for record in lines(metrics) if "rollout/reward" in record] == [1, 2, 3]
    assert [event.step for event in events(data / "events").Scalars("rollout/reward")] == [1, 2, 3]
    assert [line["step"] for line in lines(data / "rl" / "samples.jsonl")] == [1] * 4 + [2] * 4 + [3] * 4
    assert imread(data / "rl" / "curves.png").std() > 0
    assert (data / "rl" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["slt"], "There is no command 'slt'. Did you mean sft?"),
        (["sft", "--learning-rate", "1"], "--learning-rate"),
        (["sft", "--lr", "fast"], "--lr needs a number, not 'fast'"),
        (["sft"], "--tokenizer-model is not set"),
        (["sft", "--tokenizer-model", "nowhere"], "nowhere"),
        (["evaluate"], "--load is not set"),
        (["evaluate", "--load", "x"], "--eval-prompt-data is not set"),
        (["evaluate", "--load", "x", "--save", "y"], "evaluate has no flag --save"),
        (["tracerl", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(words: list[str], sentence: str) -> None:
    result = command(*words, expect=2)
    message = result.stderr.strip().splitlines()
    assert len(message) == 1 and sentence in message[0], result.stderr
    assert "Traceback" not in result.stderr and not result.stdout


def test_the_ranks_of_a_job_tell_a_mistake_once() -> None:
    """Each rank exits with 2; only the first speaks at once, the others would say that they found it alone."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_dlm", "sft", "--lr", "fast"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert said == [
        "ConfigError: --lr needs a number, not 'fast'.\n",
        "ConfigError: --lr needs a number, not 'fast'. (rank 1)\n",
    ]


def test_a_mistake_in_the_sizes_of_the_model(data) -> None:
    result = command(
        "sft",
        *MODEL,
        "--tensor-model-parallel-size",
        3,
        "--tokenizer-model",
        data / "tokenizer",
        "--data-path",
        data / "sft.jsonl",
        expect=2,
    )
    assert (
        "--tensor-model-parallel-size 3" in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr
    )


def test_help_lists_commands_and_flags() -> None:
    assert "tracerl" in command("--help").stdout
    assert "--train-iters" in command("sft", "--help").stdout
