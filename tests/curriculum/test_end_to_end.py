"""Three real stages, killed in the first two, against the same undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dlm.commands.curriculum import commands
from megatron_dlm.curriculum import controller
from megatron_dlm.curriculum.controller import Controller
from megatron_dlm.curriculum.plan import make_plan
from megatron_dlm.curriculum.ranks import Alone
from megatron_dlm.curriculum.recipe import recipe_of
from megatron_dlm.curriculum.state import read_state
from megatron_dlm.curriculum.status import status
from megatron_dlm.training.history import read_history
from tests.bad_inputs.conftest import pristine, server  # noqa: F401 (fixtures)
from tests.command_server import command_server
from tests.test_stopping import tensors

MEASURED = ("perf/", "memory/", "seconds")


def content(world: Path, save: Path) -> dict:
    data, prompts = str(world / "sft.jsonl"), [str(world / "prompts.jsonl")]
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    model |= {"num_query_groups": 2, "block_size": 4, "max_position_embeddings": 128, "init_method_std": 0.2}
    rl = {"prompt_data": prompts, "num_rollout": 3, "num_steps_per_rollout": 1, "overlong_margin": 0}
    rl |= {"min_group_accuracy": 0, "max_group_accuracy": 1}
    return {
        "save": str(save),
        "defaults": {
            "model": model | {"rotary_base": 10000},
            "tokenizer": {"tokenizer_model": str(world / "tokenizer")},
            "optimizer": {"lr": 2e-3},
            "checkpoint": {"save_interval": 2},
            "rollout": {"rollout_max_prompt_len": 32, "rollout_max_response_len": 8},
            "reward": {"reward_workers": 1},
            "run": {"seed": 3},
        },
        "stages": [
            {"name": "warm", "command": "sft", "sft": {"data_path": [data], "train_iters": 6, "global_batch_size": 8}},
            {
                "name": "rl",
                "command": "tracerl",
                "rl": rl,
                "rollout": {"rollout_batch_size": 3, "n_samples_per_prompt": 4},
                "curriculum": {"prompt_sampling": "difficulty"},
                "reward": {"format_reward": ".*[0-5].*"},
                "checkpoint": {"save_interval": 1},
            },
            {
                "name": "check",
                "command": "evaluate",
                "eval": {"eval_prompt_data": prompts, "eval_num_prompts": 8, "eval_remasking": ["dynamic"]},
                "gate": {"metric": "eval/dynamic/responses", "at_least": 8},
            },
        ],
    }


class Stage:
    """A stage in a process of the command server, killed when it has recorded so many steps."""

    def __init__(self, words: list[str], folder: Path, output: Path, dies_after: int | None) -> None:
        self.started = command_server().start(words, folder, output)
        self.metrics, self.dies_after = Path(words[words.index("--config") + 1]).parent / "metrics.jsonl", dies_after

    def poll(self) -> int | None:
        if self.dies_after is not None and self.metrics.exists():
            if len(read_history(self.metrics)) >= self.dies_after:
                self.started.kill()
        code = self.started.wait(0.02)
        if code is not None:
            self.started.kill()  # what it left behind, for it ends without cleaning up
        return code if code is None or code >= 0 else 128 - code

    def send(self, signum: int) -> None:
        raise AssertionError("nothing was to be stopped")


def launcher(output: Path, dies: dict[str, int]) -> Callable:
    """Starts stages; `dies`: name -> recorded steps after which it is killed, once."""
    output.mkdir()

    def start(words, environment) -> Stage:
        name = Path(words[words.index("--config") + 1]).parent.name
        return Stage(list(words), output, output / f"{len(list(output.iterdir()))}", dies.pop(name, None))

    return start


def results(save: Path, stage: str) -> list[dict]:
    """All that it recorded but for what was measured by the clock."""
    return [
        {name: value for name, value in record.items() if not name.startswith(MEASURED)}
        for record in read_history(save / stage / "metrics.jsonl")
    ]


@pytest.fixture
def run(pristine, tmp_path, monkeypatch) -> Callable:  # noqa: F811
    monkeypatch.setattr(controller, "_POLL", 0.0)

    def begin(name: str, dies: dict[str, int]) -> tuple[Path, list[int]]:
        """Start it until it has come to its end; its folder, and the exit codes."""
        save, codes = tmp_path / name, []
        plan = make_plan(recipe_of(content(pristine, save), "c.yaml"), commands())
        while not codes or codes[-1]:
            start = launcher(tmp_path / f"{name}-{len(codes)}", dies)
            codes.append(Controller(plan, Alone(), print, start).run())
            assert len(codes) < 5, [path.read_text() for path in tmp_path.glob(f"{name}-*/*/stderr")]
        assert "The curriculum is done" in status(plan)
        return save, codes

    return begin


def test_killed_twice_it_ends_with_the_same_metrics(run) -> None:
    whole, codes = run("whole", {})
    assert codes == [0]
    parts, codes = run("parts", {"warm": 3, "rl": 2})
    assert codes == [137, 137, 0]
    for stage, steps in (("warm", 6), ("rl", 3), ("check", 1)):
        assert results(whole, stage) == results(parts, stage) and len(results(whole, stage)) == steps
    assert read_state(whole).done[2].metrics["eval/dynamic/responses"] == 8
    expected, found = (tensors(save / "rl" / "iter_0000003") for save in (whole, parts))
    assert expected.keys() == found.keys() and len(found) > 30
    assert all(torch.equal(expected[name], found[name]) for name in found)
