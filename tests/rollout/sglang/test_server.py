"""The child's loop, over a socket pair whose buffers hold far less than a rollout."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest

from megatron_dlm.rollout.sglang.protocol import Closed, Link
from megatron_dlm.rollout.sglang.server import serve

BLOCK = dict(ids=[12345] * 32, steps=[1] * 32, logprobs=[-1.25] * 32, sampling_logprobs=[-1.25] * 32, forwards=4)


class Instant:
    """Answers every request at once, with some kilobytes."""

    def __init__(self) -> None:
        self.loop, self.answered = asyncio.new_event_loop(), 0

    async def generate(self, name: str, prompt: list[int], sampling: dict):
        for start in range(0, 320, 32):
            yield BLOCK | {"start": start}
        self.answered += 1

    def abort(self, names: list[str]) -> None:
        pass

    def call(self, command: str, message: dict) -> dict:
        return {"answered": self.answered}


def _until_closed(link: Link, backend: Instant) -> None:
    with contextlib.suppress(Closed):
        serve(link, backend)


@pytest.fixture
def trainer():
    """The trainer's end; an operation that waits for ever fails."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    ours.settimeout(20)
    backend = Instant()
    thread = threading.Thread(target=_until_closed, args=(Link(theirs), backend), daemon=True)
    thread.start()
    yield Link(ours)
    ours.close()
    thread.join(20)
    assert not thread.is_alive()  # it ends when the trainer is gone, with answers that nobody has read
    backend.loop.close()
    theirs.close()


def hand_in(link: Link, groups: int) -> list[str]:
    for group in range(groups):
        orders = [dict(name=f"{group}/{sample}", prompt=[7] * 500, sampling={}) for sample in range(4)]
        link.send({"command": "generate", "requests": orders})
    return [f"{group}/{sample}" for group in range(groups) for sample in range(4)]


def test_a_trainer_may_hand_in_all_requests_before_it_reads_an_answer(trainer) -> None:
    names = hand_in(trainer, 12)
    answers = [trainer.receive() for _ in names]
    assert sorted(answer["name"] for answer in answers) == sorted(names)
    assert all([block["start"] for block in answer["blocks"]] == list(range(0, 320, 32)) for answer in answers)


def test_answers_to_commands_come_behind_the_responses_before_them(trainer) -> None:
    names = hand_in(trainer, 6)
    first = [trainer.receive() for _ in names]
    trainer.send({"command": "told"})
    assert trainer.receive() == {"ok": True, "answered": len(names)}
    hand_in(trainer, 6)
    trainer.send({"command": "told"})
    answers = [trainer.receive() for _ in range(len(names) + 1)]
    (at,) = [index for index, answer in enumerate(answers) if "ok" in answer]
    assert answers[at]["answered"] - len(first) <= at  # those that were ready before it were sent before it
    trainer.send({"command": "stop"})
    assert trainer.receive() == {"ok": True}


def test_a_trainer_that_goes_leaves_nobody_behind(trainer) -> None:
    hand_in(trainer, 12)
