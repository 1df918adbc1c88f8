"""Both programs of benchmarks/ at small sizes: what they compare is equal, and they notice when it is not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_check, tracerl_update
from megatron_dlm import platform
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.rows import build_row
from tests.diffusion.oracles import MASK_ID, PAD_ID, expected_fingerprints, random_group, row_fingerprints, trace_item
from tests.harness import STAND_IN, pool

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2"]
SMALL += ["--kv-channels", "8", "--vocab-size", "64"]


def run(program: str, *arguments: object, hide_gpus: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


# ------------------------------------------------------------------------------------------------------ tracerl_update
UPDATE = [*SMALL, "--ffn-hidden-size", 48, "--response-length", 11, "--prompt-length", 7, "--repeats", 2]
UPDATE += ["--max-tokens-per-row", 128, "--device", "cpu"]


def test_the_three_layouts_have_one_gradient_and_are_told_apart(tmp_path) -> None:
    done = run("tracerl_update.py", *UPDATE, "--json", tmp_path / "figures.json", "--head-scale", 20)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    static, dynamic = figures["results"]
    assert static["remasking"] == "static" and static["tokens_per_step"] < dynamic["tokens_per_step"]
    for result in (static, dynamic):
        assert result["response_tokens"] == 4 * 11
        assert set(result["updates"]) == {"packed", "per step", "per round"}
        assert all(difference < 1e-4 for difference in result["gradient_difference"].values())
        assert all(difference > 0 for difference in result["gradient_difference"].values())  # they are not one file
        tokens = {layout: updates[0]["tokens"] for layout, updates in result["updates"].items()}
        assert tokens["packed"] < tokens["per round"] < tokens["per step"]
        for updates in result["updates"].values():
            assert len(updates) == 2
            for update in updates:
                assert update["peak"] > 0 and update["rows"] * update["length"] >= update["tokens"]
                assert set(update["seconds"]) == {"rows", "old log-probs", "forward+backward", "optimizer", "refit"}
                assert update["total"] == pytest.approx(sum(update["seconds"].values()))
        assert [len(ratios) for ratios in result["speed_up"].values()] == [2, 2]
    assert done.stdout.count("gradient diff.") == 2 and done.stdout.count("times as fast as") == 4


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_no_speed_is_claimed_for_layouts_that_compute_something_else(difference: float) -> None:
    result = {"gradient_difference": {"per step": 1e-6, "per round": difference}}
    assert "not compared" in tracerl_update.unequal(result, 1e-4)
    assert tracerl_update.unequal({"gradient_difference": {"per step": 9e-5}}, 1e-4) is None


@pytest.mark.parametrize("split", ["one_item_per_step", "one_item_per_round"])
@pytest.mark.parametrize("prompt", [4, 6])
def test_a_rival_layout_shows_every_token_the_state_in_which_it_was_decided(split: str, prompt: int) -> None:
    """Against the oracle that walks through the states of a trace."""
    platform.install()
    from benchmarks import layouts

    trace = random_group(prompt, [13], 4, np.random.default_rng(prompt))[0]
    item = trace_item(trace, Grid(4))
    parts = getattr(layouts, split)(0, item)
    assert len({part.group for part in parts}) == len(parts) > 1
    if split == "one_item_per_step":
        assert len(parts) == len(item.views.block)
    else:
        assert len(parts) == max(np.bincount(item.views.block))
    length = sum(part.shared_length + part.own_length for part in parts)
    found = row_fingerprints(build_row([(0, part) for part in parts], length, MASK_ID, PAD_ID))
    assert {index: value for (_, index), value in found.items()} == expected_fingerprints(trace, Grid(4))


def test_a_shard_of_drawn_weights_is_a_part_of_the_whole() -> None:
    """[gate; up] is divided half by half, everything else in one piece."""
    from benchmarks.common import _shard

    whole = torch.arange(8.0)[:, None]
    assert _shard(whole, 0, False, 1, 2)[:, 0].tolist() == [4, 5, 6, 7]
    assert _shard(whole, 0, True, 1, 2)[:, 0].tolist() == [2, 3, 6, 7]
    assert torch.equal(_shard(whole, None, False, 1, 2), whole)


# ---------------------------------------------------------------------------------------------------------- gpu_check
def test_without_a_gpu_it_says_what_it_needs() -> None:
    done = run("gpu_check.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "needs a GPU" in done.stderr


def heads() -> list[tuple[str, bool, int]]:
    """Attention and loss head of a benchmark's model where a session's trial of kernels ends well, and where not."""
    from unittest import mock

    from benchmarks.common import build_state, loss_chunk, open_session
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.training.setup import Session
    from tests.tiny import model_config

    session = open_session(model_config(vocab_size=64), ParallelConfig(loss_chunk_size=128))
    found = []
    for fused in (True, False):
        with mock.patch.object(Session, "_kernels", lambda _, fused=fused: ("dense", fused)):
            state = build_state(session, None, 1, 1.0)
        found.append((state.module.attention_backend, state.module.fused_head, loss_chunk(session, state)))
    return found


def test_models_have_the_kernels_that_a_session_has() -> None:
    assert pool(1).run(heads) == [[("dense", True, 128), ("dense", False, 0)]]


def drawn(layers: str) -> dict[str, torch.Tensor]:
    """Weights by names that all layers share."""
    from benchmarks.common import build_state, open_session
    from benchmarks.fused_layers import model_of
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.rollout.reshard_plan import canonical

    state = build_state(open_session(model_of(experts=True), ParallelConfig(transformer_impl=layers)), None, 1, 2.0)
    return {canonical(name, 0): parameter.detach() for name, parameter in state.named_parameters()}


def test_plain_and_fused_layers_have_the_same_weights() -> None:
    plain, fused = (pool(1, STAND_IN).run(drawn, layers)[0] for layers in ("local", "transformer_engine"))
    assert plain.keys() == fused.keys() and all(torch.equal(plain[name], fused[name]) for name in plain)


def forked(run: gpu_check.Run, order: Path) -> None:
    """As gpu_check.start, in processes that need not import everything."""
    platform.install()
    from benchmarks import device_cases

    pool(run.processes).run(device_cases.main, [str(order)])
    pool(run.processes).close()  # it has left its job


def as_started(run: gpu_check.Run) -> bool:
    """The run that the next test starts as a person does, by torchrun."""
    return run.layout == "DP 2" or platform.is_cuda()


def test_the_cpu_passes_alone_and_in_two_processes(capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        gpu_check, "start", lambda run, order, start=gpu_check.start: (start if as_started(run) else forked)(run, order)
    )
    assert gpu_check.main(["--device", "cpu", "--precision", "fp32", "--processes", "2", *SMALL]) == 0
    table = capsys.readouterr().out
    assert table.count("PASS") == 3 * 24 + 6 and "FAIL" not in table
    for what in (
        "logits, sft",
        "gradients, tracerl",
        "steps, distributed optimizer: weights",
        "rollout against trainer",
        "rollout attention, flex against sdpa",
        "rollout, log-probabilities, dynamic by flex",
    ):
        assert sum(line.startswith(what) and "PASS" in line for line in table.splitlines()) >= 3, what
    assert sum(line.startswith("attention of training, ") for line in table.splitlines()) == 6
    assert "fp32 TP 2" in table and "fp32 DP 2" in table


def test_a_disturbed_candidate_fails(capsys, monkeypatch) -> None:
    if not platform.is_cuda():
        monkeypatch.setattr(gpu_check, "start", forked)
    assert gpu_check.main(["--device", "cpu", "--precision", "fp32", "--disturb", "1e-3", *SMALL]) == 1
    table = capsys.readouterr().out
    for what in ("logits, sft", "gradients, sft", "log-probabilities", "steps: losses", "rollout, log-probabilities"):
        assert any(line.startswith(what) and "FAIL" in line for line in table.splitlines()), what
    # What a run says about itself alone still holds.
    assert all("PASS" in line for line in table.splitlines() if line.startswith("rollout against trainer"))


def test_a_check_passes_only_within_its_tolerance() -> None:
    check = gpu_check.Check("logits", "fp32", "rel", 1e-6, 1e-5, 0.0)
    assert check.passed
    assert not dataclasses.replace(check, difference=2e-5).passed
    assert not dataclasses.replace(check, difference=float("nan")).passed
