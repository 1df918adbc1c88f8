"""Adapters as a person uses them: from fine-tuning through RL to a checkpoint without any."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.bad_inputs.bench import SFT
from tests.bad_inputs.conftest import pristine, server  # noqa: F401 (fixtures)
from tests.test_rl_commands import RL, folder, metrics_of, moved, run, same  # noqa: F401 (a fixture)
from tests.test_stopping import tensors

LORA = "--lora-rank 4 --lora-alpha 8 "
FIRST = "iter_0000002"


def adapters(folder: Path) -> dict[str, torch.Tensor]:  # noqa: F811
    return {name: value for name, value in tensors(folder).items() if ".lora." in name and "optim" not in name}


def test_from_fine_tuning_to_a_plain_checkpoint(folder: Path) -> None:  # noqa: F811
    """A plain checkpoint gets adapters, which alone learn and are resumed; then they learn by RL and are merged."""
    train = "sft " + SFT.replace("--train-iters 3", "--lr 1e-2") + "--train-iters "
    assert "in adapters that learn" in run(train + "4 --load ckpt --finetune --save lora " + LORA, folder)
    run(train + "4 --load ckpt --finetune --exit-interval 2 --save parts " + LORA, folder)
    run(train + "4 --load parts --save parts", folder)
    assert same(folder / "lora" / "iter_0000004", folder / "parts" / "iter_0000004")
    assert moved(folder / "ckpt" / FIRST, folder / "lora" / "iter_0000004") == set()
    learned = adapters(folder / "lora" / "iter_0000004")
    assert len(learned) == 8 and all(value.any() for value in learned.values())
    held = {name for name in tensors(folder / "lora" / "iter_0000004") if name.startswith("optimizer")}
    assert held and all(".lora." in name for name in held)

    value = "--use-value-model --value-lr 1e-3 --verify-refit --num-rollout 1 "
    run(RL + value + "--load lora --finetune --save rl-lora " + LORA, folder)
    (record,) = metrics_of(folder / "rl-lora")
    assert record["train/train_rollout_logprob_abs_diff"] < 1e-5
    assert moved(folder / "ckpt" / FIRST, folder / "rl-lora" / "iter_0000001") == set()
    last = adapters(folder / "rl-lora" / "iter_0000001")
    assert all(not torch.equal(last[name], learned[name]) for name in last)

    run("convert merge-lora --load rl-lora --save merged", folder)
    merged, base = tensors(folder / "merged" / "iter_0000000"), tensors(folder / "ckpt" / FIRST)
    for name, weight in merged.items():
        if (first := name.replace(".weight", ".lora.a")) in last and name.endswith(".weight"):
            a, b = last[first], last[first[:-1] + "b"]
            torch.testing.assert_close(weight, base[name] + 2 * b @ a, rtol=1e-5, atol=1e-6)
            assert not torch.equal(weight, base[name])
        else:
            assert torch.equal(weight, base[name]), name
    run("convert megatron-to-hf --load rl-lora --save hf", folder)
    exported, layer = load_file(folder / "hf" / "model.safetensors"), "decoder.layers"
    gate, up = merged[f"{layer}.mlp.linear_fc1.weight"][1].chunk(2)
    for name, weight in (
        ("self_attn.o_proj", merged[f"{layer}.self_attention.linear_proj.weight"][1]),
        ("mlp.gate_proj", gate),
        ("mlp.up_proj", up),
        ("mlp.down_proj", merged[f"{layer}.mlp.linear_fc2.weight"][1]),
    ):
        torch.testing.assert_close(exported[f"model.layers.1.{name}.weight"], weight, rtol=1e-5, atol=1e-6)
    for name in ("rl-lora", "merged"):
        words = f"generate --load {name} --prompts prompts.jsonl --output {name}.jsonl --max-new-tokens 8"
        run(words + " --temperature 0", folder)
    said = [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("rl-lora", "merged")]
    assert [json.loads(line)["token_ids"] for line in said[0]] == [json.loads(line)["token_ids"] for line in said[1]]
