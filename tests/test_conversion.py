"""From an autoregressive model to one of block diffusion: its blocks, its logit shift, the start of its mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hf.folders import read
from tests.test_commands import MODEL, command, data, lines  # noqa: F401  (data is a fixture)

SAYS = "(--mask-embedding-init)"
SIZES = [*MODEL[: MODEL.index("--block-size")], *MODEL[MODEL.index("--block-size") + 2 :]]
STILL = ("--lr", 1e-12, "--train-iters", 1, "--global-batch-size", 8)  # weights that are read afterwards do not move
TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def start(data) -> tuple[Path, list[object]]:  # noqa: F811
    """The folder of an autoregressive model, as a run and as a Qwen3 checkpoint; flags that further training needs."""
    train = ["--data-path", data / "sft.jsonl", *STILL]
    causal = ["--block-size", 1, "--logit-shift", 1, "--sft-objective", "ar", "--tokenizer-model", data / "tokenizer"]
    said = command("sft", *SIZES, *causal, *train, "--save", data / "ar")
    assert SAYS not in said.stdout
    command("convert", "megatron-to-hf", "--load", data / "ar", "--save", data / "hf")
    return data, train


def exported(run: Path, folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors of a run's checkpoint as a HuggingFace one."""
    command("convert", "megatron-to-hf", "--load", run, "--save", folder)
    return json.loads((folder / "config.json").read_text()), read(folder)


def test_an_autoregressive_model_is_a_qwen3(start) -> None:
    config = json.loads((start[0] / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and "block_size" not in config


def test_the_shift_is_kept_unless_told_and_the_mask_begins_as_the_mean(start, tmp_path) -> None:
    data, train = start  # noqa: F811
    blocks = ["--block-size", 4, "--finetune"]
    kept = command("sft", "--load", data / "ar", *blocks, *train, "--save", tmp_path / "kept")
    dropped = command("sft", "--load", data / "ar", *blocks, "--logit-shift", 0, *train, "--save", tmp_path / "dropped")
    before = read(data / "hf")
    mask = json.loads((data / "hf" / "config.json").read_text())["mask_token_id"]
    others = [row for row in range(len(before[TABLE])) if row != mask]
    for said, name, family in ((kept, "kept", "Qwen3ForCausalLM"), (dropped, "dropped", "SDARForCausalLM")):
        assert f"The embedding of the mask token {mask} begins as the mean of the others {SAYS}" in said.stdout
        config, after = exported(tmp_path / name, tmp_path / f"{name}-hf")
        assert config["architectures"] == [family] and config["block_size"] == 4
        torch.testing.assert_close(after[TABLE][others], before[TABLE][others])
        torch.testing.assert_close(after[TABLE][mask], before[TABLE][others].mean(0))
    train[train.index("--train-iters") + 1] = 2
    again = command("sft", "--load", tmp_path / "kept", *train, "--save", tmp_path / "kept")
    train[train.index("--train-iters") + 1] = 1
    assert SAYS not in again.stdout and "Saved iteration 2" in again.stdout  # a run that is resumed
    further = command("sft", "--load", tmp_path / "dropped", "--finetune", *train)
    assert SAYS not in further.stdout  # it has learned the mask
    from_hf = command("sft", "--hf-checkpoint", tmp_path / "kept-hf", *train)
    assert SAYS not in from_hf.stdout
    outputs = []
    for source in (["--load", tmp_path / "kept", "--ckpt-step", 1], ["--hf-checkpoint", tmp_path / "kept-hf"]):
        outputs.append(tmp_path / f"out{len(outputs)}.jsonl")
        flags = ["--prompts", data / "prompts.jsonl", "--output", outputs[-1], "--max-new-tokens", 8]
        command("generate", *source, *flags, "--temperature", 0)
    assert lines(outputs[0]) == lines(outputs[1])  # blocks and shift come with the checkpoint


def test_from_a_checkpoint_whose_vocabulary_ends_before_the_mask(start, tmp_path) -> None:
    """The tokenizer gets a mask, and the model a row for it; here a copy of another token's."""
    data, train = start  # noqa: F811
    before = read(data / "hf")
    new = len(before[TABLE])
    flags = ["--hf-checkpoint", data / "hf", "--mask-token-id", new, "--mask-embedding-init", "}"]
    said = command("sft", *flags, "--block-size", 4, *train, "--save", tmp_path / "run")
    assert f"The embedding of the mask token {new} begins as that of the token }} {SAYS}" in said.stdout
    config, after = exported(tmp_path / "run", tmp_path / "hf")
    assert config["mask_token_id"] == new and config["vocab_size"] == new + 1 == len(after[TABLE])
    torch.testing.assert_close(after[TABLE][:new], before[TABLE])
    assert (after[TABLE][new] - before[TABLE]).abs().amax(1).lt(1e-6).sum() == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sft --load {ar} --block-size 4", ("--block-size 1", "--finetune")),
        ("sft --load {ar} --finetune --block-size 4 --rotary-base 7", ("--rotary-base",)),
        ("evaluate --load {ar} --eval-prompt-data {data}/prompts.jsonl --logit-shift 0", ("--logit-shift 1", "Use 1.")),
        ("sft --load {ar} --finetune --mask-embedding-init <|MASK|>", ("is the mask token itself",)),
    ],
)
def test_mistakes(start, words: str, says: tuple[str, ...]) -> None:
    data, train = start  # noqa: F811
    given = words.format(ar=data / "ar", data=data).split()
    more = train if given[0] == "sft" else []
    error = command(*given, *more, expect=2).stderr.strip()
    assert len(error.splitlines()) == 1 and all(one in error for one in says), error
