"""Two controllers: what rank 0 decides both do, and what fails on one ends both. Their stages only pretend to run."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_dlm.config.errors import TrainingError
from megatron_dlm.curriculum import controller
from megatron_dlm.curriculum.controller import Controller
from megatron_dlm.curriculum.ranks import PART, Together
from megatron_dlm.curriculum.state import read_state
from tests.curriculum.worlds import GATE, Pretender, plan_of
from tests.harness import free_port, pool

CHECK = {"name": "check", "command": "evaluate", "gate": GATE}


class Companion:
    """Stages that write nothing. Attributes: code: with which they end. hangs: until they are told to."""

    def __init__(self, code: int = 0, hangs: bool = False) -> None:
        self.code, self.hangs, self.sent = code, hangs, []

    def __call__(self, words, environment) -> Companion:
        assert environment[PART].startswith("stage ") and environment["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        return self

    def poll(self) -> int | None:
        return None if self.hangs and not self.sent else self.code

    def send(self, signum: int) -> None:
        self.sent.append(signum)


def work(save: str, port: int, fails: bool, score: float) -> tuple[object, list[str]]:
    import torch.distributed as dist

    rank, said = int(os.environ["RANK"]), []
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60), wait_for_workers=False)
    ranks = Together(store, rank, 2, keeps=rank == 0)
    controller.TERM_SECONDS, controller._ASK_OTHERS = 0.2, 0.05
    if rank == 0:
        start = Companion(code=143, hangs=True) if fails else Pretender([score])
    else:
        start = Companion(code=7) if fails else Companion()
    try:
        code = Controller(plan_of(save, {"name": "a"}, CHECK), ranks, said.append, start).run()
    except TrainingError as error:
        return (str(error), error.told), said
    return (code, getattr(start, "sent", [])), said


def test_both_go_to_the_end(tmp_path: Path) -> None:
    (first, said), (second, silent) = pool(2).run(work, str(tmp_path), free_port(), False, 0.9)
    assert first[0] == second[0] == 0 and silent == []
    assert said[-1].startswith("The curriculum is done: 2 stages")
    assert [visit.stage for visit in read_state(tmp_path).done] == ["a", "check"]


def test_a_failure_of_one_ends_the_other(tmp_path: Path) -> None:
    (first, said), (second, _) = pool(2).run(work, str(tmp_path), free_port(), True, 0.9)
    assert first == (7, [15]) and second == (7, []), "rank 0 had to be told to leave"
    assert "exit code 7 on rank 1" in said[-1]


def test_a_gate_stops_both_and_one_of_them_tells(tmp_path: Path) -> None:
    (first, _), (second, _) = pool(2).run(work, str(tmp_path), free_port(), False, 0.1)
    assert first[0] == second[0] and "is not passed" in first[0]
    assert (first[1], second[1]) == (False, True)


@pytest.mark.parametrize("part", [None, "stage a 1"])
def test_the_part_of_the_store_is_read_where_children_meet(monkeypatch, part: str | None) -> None:
    import torch.distributed as dist

    from megatron_dlm.parallel import meeting

    store = dist.TCPStore("127.0.0.1", free_port(), 1, True, timedelta(seconds=60))
    monkeypatch.setattr(meeting, "_connect", lambda timeout: store)
    monkeypatch.delenv(PART, raising=False) if part is None else monkeypatch.setenv(PART, part)
    found = meeting.store_of_part(timedelta(seconds=5))
    if part is None:
        assert found is None
        return
    found.set("x", "1")
    monkeypatch.setenv(PART, "stage b 2")
    assert not meeting.store_of_part(timedelta(seconds=5)).check(["x"])
