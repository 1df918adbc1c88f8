"""HuggingFace checkpoints as a person uses them: out of a run, into every command, and mistakes in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.test_commands import command, data, lines, trained  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def exported(trained) -> tuple[Path, Path]:  # noqa: F811
    """The folder of the data, and a HuggingFace checkpoint of the trained model."""
    data, _ = trained  # noqa: F811
    command("convert", "megatron-to-hf", "--load", data / "ckpt", "--save", data / "hf")
    return data, data / "hf"


def test_what_is_exported(exported) -> None:
    data, hf = exported  # noqa: F811
    config = json.loads((hf / "config.json").read_text())
    assert config["architectures"] == ["SDARForCausalLM"] and config["model_type"] == "sdar"
    assert config["block_size"] == 4 and config["num_hidden_layers"] == 2 and config["rope_theta"] == 10000
    assert config["mask_token_id"] < config["vocab_size"] and config["torch_dtype"] == "float32"
    assert (hf / "tokenizer.json").exists()
    weights = load_file(hf / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], 32)
    result = command("convert", "verify", "--hf-checkpoint", hf, "--load", data / "ckpt")
    assert f"All {len(weights)} tensors" in result.stdout and "are equal, bit by bit" in result.stdout


def test_every_command_reads_it(exported, tmp_path) -> None:
    """With nothing said about model and tokenizer; and what is computed is what the run's own checkpoint gives."""
    data, hf = exported  # noqa: F811
    prompts, short = data / "prompts.jsonl", ["--max-new-tokens", 12, "--temperature", 0]
    for name, source in (("own", ["--load", data / "ckpt"]), ("hf", ["--hf-checkpoint", hf])):
        command("generate", *source, "--prompts", prompts, "--output", tmp_path / f"{name}.jsonl", *short)
    assert (tmp_path / "own.jsonl").read_text() == (tmp_path / "hf.jsonl").read_text()
    scored = tmp_path / "scored.jsonl"
    command("score", "--hf-checkpoint", hf, "--input", tmp_path / "hf.jsonl", "--output", scored)
    for line in lines(scored):
        assert line["trace_logprobs"] == pytest.approx(line["logprobs"], abs=1e-4)
    flags = ["--eval-prompt-data", prompts, "--eval-num-prompts", 8, "--rollout-max-response-len", 12]
    assert "dynamic" in command("evaluate", "--hf-checkpoint", hf, *flags, "--reward-workers", 1).stdout


def test_training_from_it_and_out_again(exported, tmp_path) -> None:
    """The files that came with the checkpoint go through training; the weights are new."""
    data, hf = exported  # noqa: F811
    (hf / "modeling_sdar.py").write_text("# code of the checkpoint\n")
    train = ["--data-path", data / "sft.jsonl", "--train-iters", 2, "--lr-decay-iters", 4, "--global-batch-size", 8]
    command("sft", "--hf-checkpoint", hf, *train, "--save", tmp_path / "run")
    train[3] = 4
    command("sft", "--load", tmp_path / "run", *train, "--save", tmp_path / "run", "--keep-last-n", 1)
    command("convert", "megatron-to-hf", "--load", tmp_path / "run", "--save", tmp_path / "out")
    assert (tmp_path / "out" / "modeling_sdar.py").read_text() == "# code of the checkpoint\n"
    result = command(
        "convert", "verify", "--hf-checkpoint", hf, "--load", tmp_path / "run", expect=2
    )  # exits with 2 where something differs
    assert "tensors in" in result.stderr and "differ from" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["convert"], "convert does not know nothing. Use one of: hf-to-megatron"),
        (["convert", "hf-to-megatrom"], "Did you mean hf-to-megatron?"),
        (["convert", "hf-to-megatron"], "--hf-checkpoint is not set"),
        (["convert", "hf-to-megatron", "--hf-checkpoint", "nowhere", "--save", "x"], "There is no folder nowhere"),
        (["convert", "megatron-to-hf", "--load", "nowhere", "--save", "x"], "There is no checkpoint folder nowhere"),
        (["convert", "megatron-to-hf", "--load", "{ckpt}", "--save", "{hf}"], "exists already"),
        (["convert", "megatron-to-hf", "--load", "{ckpt}", "--save", "{new}", "--hf-family", "gpt"], "--hf-family gpt"),
        (["convert", "megatron-to-hf", "--load", "{ckpt}", "--save", "{new}", "--hf-family", "dream"], "no place for"),
        (["convert", "megatron-to-hf", "--load", "{ckpt}", "--save", "{new}", "--export-dtype", "int8"], "int8 is not"),
        (["convert", "megatron-to-hf", "--load", "{ckpt}", "--save", "{new}", "--max-shard-gb", "0"], "--max-shard-gb"),
        (["convert", "megatron-to-hf", "--load", "{ckpt}", "--save", "/dev/null/x"], "cannot be written to"),
        (["generate", "--hf-checkpoint", "{hf}", "--load", "{ckpt}", "--prompts", "p", "--output", "o"], "both name"),
        (["evaluate", "--hf-checkpoint", "{ckpt}", "--eval-prompt-data", "p"], "config.json cannot be read"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(exported, tmp_path, words: list[str], sentence: str) -> None:
    data, hf = exported  # noqa: F811
    places = dict(ckpt=data / "ckpt", hf=hf, new=tmp_path / "new")
    result = command(*(word.format(**places) for word in words), expect=2)
    message = result.stderr.strip().splitlines()
    assert len(message) == 1 and sentence in message[0], result.stderr
    assert not (tmp_path / "new").exists()
