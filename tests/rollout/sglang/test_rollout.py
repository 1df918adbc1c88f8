"""A rollout that does not wait for its last responses, with an engine in a process of its own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_dlm.rollout.replicas import roll
from megatron_dlm.rollout.sglang.client import Room, SGLangEngine
from tests.rollout.naive import generate
from tests.rollout.sglang.test_client import start
from tests.rollout.sglang.test_denoise import SAMPLING, requests
from tests.tiny import make_model


@pytest.fixture(scope="module")
def engine():
    made = SGLangEngine(start, Room(max_length=80, block_size=4, bytes_per_token=100, slots=3))
    yield made
    made.close()


def test_what_was_stopped_goes_on_to_the_same_end(engine) -> None:
    made, rig = make_model(torch.float64), SimpleNamespace(engine=engine, replica=0, num_replicas=1, groups=None)
    rig.groups = SimpleNamespace(tp=None)
    short = requests(dataclasses.replace(SAMPLING, ignore_eos=True, max_new_tokens=3), 6)
    long = requests(dataclasses.replace(SAMPLING, ignore_eos=True, max_new_tokens=60), 6)
    wanted = [(long if number % 3 == 0 else short)[number] for number in range(6)]
    engine.weight_version = 4
    first = roll(rig, "test", 6, 1, lambda number: [wanted[number]], enough=2)
    assert engine.idle and len(first.places) == len(first.finished) >= 2
    assert sorted(first.places.values()) == list(range(len(first.places)))
    engine.weight_version = 5
    by_key = {request.prompt_key: request for request in wanted}
    own = [dataclasses.replace(by_key[trace.prompt_key], partial=trace) for trace in first.aborted]
    assert any(request.prompt_key == "p0" for request in own)
    begun = {trace.prompt_key for trace in first.finished + first.aborted}
    rest = [request for request in wanted if request.prompt_key not in begun]
    second = roll(rig, "test", len(rest), 1, lambda number: [rest[number]], own)
    found = {trace.prompt_key: trace for trace in first.finished + second.finished}
    assert len(found) == 6 == len(first.finished) + len(second.finished) and not second.aborted
    for request in wanted:
        trace, naive = found[request.prompt_key], generate(made, request)
        assert trace.response_ids.tolist() == naive.response and trace.steps.tolist() == naive.steps
        done = next((len(one.response_ids) for one in first.aborted if one.prompt_key == request.prompt_key), 0)
        old = len(naive.response) if request.prompt_key in first.places else done
        versions = [4] * old + [5] * (len(naive.response) - old)
        assert trace.weight_versions.tolist() == versions
