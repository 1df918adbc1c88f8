"""The curriculum that is delivered passes its own checks, on 64 processes that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dlm.commands.curriculum import _config_of, commands
from megatron_dlm.commands.stage_checks import check_stages
from megatron_dlm.curriculum.plan import make_plan
from megatron_dlm.curriculum.recipe import read_recipe

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "long_cot_8b.yaml"


def test_long_chains_of_thought_on_64_processes(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    plan = make_plan(read_recipe(str(CONFIG)), commands())
    assert [stage.name for stage in plan.stages] == [
        "instruct",
        "long-sft",
        "thinks",
        "long-rl-1",
        "long-rl-2",
        "long-rl-3",
        "final",
    ]
    found = check_stages(plan, 64)
    layouts = {name: line for name, lines in found.told.items() for line in lines if line.startswith("Layout")}
    assert all("64 processes = tensor 2 x" in line for line in layouts.values()) and len(layouts) == 5
    assert "up to 30,000 tokens" in " ".join(found.told["long-rl-3"])
    assert "data/long_cot_sft.jsonl (--data-path)" in found.absent["long-sft"]
    prefixes = [stage.get("tokenizer", "response_prefix") for stage in plan.stages]
    assert prefixes == [None, *["<think>\n"] * 6]
    assert plan.stages[5].get("reward", "format_reward") == "think"


@pytest.mark.parametrize(
    ("argv", "path", "rest"),
    [
        (["--config", "c.yaml"], "c.yaml", []),
        (["--set", "a=1", "--config=c", "--set", "b=2", "--status"], "c", ["--status", "--set", "a=1", "b=2"]),
        (["--dry-run"], None, ["--dry-run"]),
    ],
)
def test_changes_may_be_given_several_times(argv: list[str], path: str | None, rest: list[str]) -> None:
    assert _config_of(argv) == (path, rest)
