"""The engine as the trainer sees it, over a child that is a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import DataError, DependencyError
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.rollout.request import Request
from megatron_dlm.rollout.sglang.client import Room, SGLangEngine, visible_devices
from megatron_dlm.rollout.sglang.process import Child, ChildSettings, server_command
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.harness import pool
from tests.rollout.naive import generate
from tests.rollout.sglang.test_denoise import SAMPLING, requests
from tests.tiny import make_model

_ROOT = Path(__file__).resolve().parents[3]


def settings(**changes: object) -> ChildSettings:
    plain = dict(
        config={"architectures": ["SDARForCausalLM"]},
        mask_id=MASK_ID,
        vocabulary_size=PAD_ID + 1,
        block_size=4,
        max_running_requests=8,
        context_length=64,
        dtype="float32",
        mem_fraction_static=0.4,
        devices=None,
        tensor_parallel_size=1,
    )
    return ChildSettings(**plain | changes)


def start(*words: str, inherited: tuple[int, ...] = ()) -> Child:
    # The child's own path leads to the package alone, as it should; the tests are found from here.
    script = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from tests.rollout.sglang.fake_server import main; "
    return Child([sys.executable, "-c", script + "main(sys.argv[1:])", *(words or ("serve",))], settings(), inherited)


@pytest.fixture(scope="module")
def engine():
    made = SGLangEngine(start, Room(max_length=40, block_size=4, bytes_per_token=100, slots=8))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float64)


@pytest.mark.parametrize("changes", [{}, dict(temperature=0.0), dict(top_p=0.8, temperature=0.7)])
def test_traces_are_those_of_the_naive_engine(engine, model, changes: dict) -> None:
    wanted = requests(dataclasses.replace(SAMPLING, **changes), 6)
    engine.weight_version = 9
    traces = {trace.prompt_key: trace for trace in engine.run(wanted)}
    assert engine.idle and len(traces) == 6
    for request in wanted:
        trace, naive = traces[request.prompt_key], generate(model, request)
        assert (trace.response_ids.tolist(), trace.tail_ids.tolist()) == (naive.response, naive.tail)
        assert (trace.steps.tolist(), trace.tail_steps.tolist()) == (naive.steps, naive.tail_steps)
        np.testing.assert_allclose(trace.logprobs, naive.logprobs, rtol=0, atol=1e-10)
        assert trace.finish_reason == naive.reason and trace.sampling == request.sampling
        assert set(trace.weight_versions.tolist()) == {9}


def test_requests_may_be_handed_in_while_others_run(engine, model) -> None:
    wanted, traces = requests(SAMPLING, 6), []
    assert engine.vacancies == 8
    for request in wanted:
        engine.submit([request])
        assert engine.vacancies < 8
        traces += engine.step()
    while not engine.idle:
        traces += engine.step()
    assert {trace.prompt_key: trace.response_ids.tolist() for trace in traces} == {
        request.prompt_key: generate(model, request).response for request in wanted
    }
    assert engine.step() == []


def test_an_aborted_response_has_whole_blocks(engine, model) -> None:
    long = dataclasses.replace(SAMPLING, ignore_eos=True, max_new_tokens=30)
    wanted = requests(long, 4)
    engine.submit(wanted)
    found = engine.abort([("p1", 0)])
    assert not engine.idle and engine.vacancies == 5 and {trace.prompt_key for trace in found} <= {"p1"}
    finished: list = []
    while not finished:  # the others have gone some way meanwhile
        finished = engine.step()
    found += finished + engine.abort()
    assert engine.idle and engine.abort() == [] and len({trace.prompt_key for trace in found}) == len(found)
    requests_by_key = {request.prompt_key: request for request in wanted}
    for trace in found:
        request = requests_by_key[trace.prompt_key]
        naive, length = generate(model, request), len(trace.response_ids)
        assert trace.response_ids.tolist() == naive.response[:length] and trace.steps.tolist() == naive.steps[:length]
        if trace.finish_reason == "abort":
            assert length > 0 and (len(request.prompt_ids) + length) % 4 == 0
            assert len(trace.tail_ids) == 0
    assert {trace.finish_reason for trace in finished} == {"length"}


def test_an_aborted_response_that_had_not_begun_is_forgotten(engine) -> None:
    """As in the native engine; what it brought with it is not."""
    nothing, two = np.zeros(0, np.int64), np.array([1, 2])
    begun = Trace(
        np.array([13, 2]), np.array([3, 4]), nothing, two, nothing, -two / 2, -two / 4, two, SAMPLING, "begun", 0,
        "abort", 3,
    )  # fmt: skip
    fresh = Request(np.array([13, 2]), SAMPLING, "fresh", 0, 1)
    engine.submit([fresh, dataclasses.replace(fresh, prompt_key="begun", partial=begun)])
    (kept,) = engine.abort()
    assert engine.idle and (kept.prompt_key, kept.finish_reason, kept.num_forwards) == ("begun", "abort", 3)
    assert kept.response_ids.tolist() == [3, 4] and kept.weight_versions.tolist() == [1, 2]


def test_impossible_requests_are_refused_before_any_is_handed_over(engine) -> None:
    fine, prompt = requests(SAMPLING, 1), np.arange(39)
    for bad, words in (
        (Request(np.arange(0), SAMPLING, "bad", 0, 1), "has no tokens"),
        (Request(prompt, SAMPLING, "bad", 0, 1), "more than the 40"),
        (Request(np.arange(3), dataclasses.replace(SAMPLING, block_size=8), "bad", 0, 1), "blocks of 8 tokens"),
    ):
        with pytest.raises(DataError, match=words):
            engine.submit([*fine, bad])
    assert engine.idle


def test_sleeping_and_waking(engine) -> None:
    assert engine.kv_cache_bytes == 64000
    before = engine.command("told")["calls"]
    engine.sleep()
    engine.sleep()
    assert engine.kv_cache_bytes == 0
    engine.run(requests(SAMPLING, 1))  # wakes by itself
    assert engine.kv_cache_bytes == 64000
    engine.wake()
    engine.drop_cache()
    assert engine.command("told")["calls"][len(before) :] == ["sleep", "wake", "flush_cache", "told"]


def test_what_needs_an_idle_engine_says_so(engine) -> None:
    engine.submit(requests(SAMPLING, 1))
    for action in (engine.drop_cache, engine.sleep):
        with pytest.raises(ValueError, match="in work"):
            action()
    engine.abort()


def test_failures_of_the_child_are_told(engine) -> None:
    with pytest.raises(RuntimeError, match="ArithmeticError: as asked"):
        engine.command("fail")
    assert engine.command("told")["ok"], "it goes on"
    with pytest.raises(RuntimeError, match="an unlucky prompt"):
        engine.run([Request(np.array([13, 1]), SAMPLING, "unlucky", 0, 1)])
    engine._running.clear()


def test_the_child_sees_its_own_path_and_no_job(engine) -> None:
    found = engine.command("told")["environment"]
    assert found["RANK"] is None and found["WORLD_SIZE"] is None
    path = Path(found["PYTHONPATH"])
    assert sorted(entry.name.split("-")[0] for entry in path.iterdir()) == ["megatron_dlm", "megatron_dlm"]
    (about,) = path.glob("*.dist-info")
    assert "megatron_dlm.rollout.sglang.plugin:register" in (about / "entry_points.txt").read_text()
    folder = path.parent
    assert json.loads((folder / "model" / "config.json").read_text())["architectures"] == ["SDARForCausalLM"]
    assert json.loads((folder / "algorithm.yaml").read_text()) == dict(
        block_size=4, mask_id=MASK_ID, vocabulary_size=PAD_ID + 1
    )


def gone(pid: int) -> bool:
    for _ in range(1200):  # a child that still imports what it needs looks up only then
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_child_ends_with_its_owner() -> None:
    closed = SGLangEngine(start, Room(40, 4, 1))
    folder, pid = closed.child.folder, closed.child.process.pid
    closed.close()
    assert gone(pid) and not folder.exists()


@pytest.mark.parametrize("way", ["serve", "hang"])
def test_the_child_ends_when_its_owner_is_killed(way: str, tmp_path) -> None:
    """A trainer that gets SIGKILL while its child starts (hang) or works, with what the child itself started."""
    script = (
        f"import sys, subprocess; sys.path.insert(0, {str(_ROOT)!r})\n"
        "from tests.rollout.sglang import test_client as t\n"
        "from megatron_dlm.rollout.sglang import process\n"
        "popen = process.subprocess.Popen\n"
        "def noting(*args, **options):\n"
        "    made = popen(*args, **options)\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(f'{{made.pid}} {{options[\"cwd\"]}}')\n"
        "    return made\n"
        "process.subprocess.Popen = noting\n"
        f"child = t.start({way!r})\n"
        "child.link.receive()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=_ROOT)
    while not (tmp_path / "pid").exists() or len((tmp_path / "pid").read_text().split()) < 2:
        time.sleep(0.05)
    pid, folder = (tmp_path / "pid").read_text().split()
    if way == "hang":
        while not (Path(folder) / "log").exists():
            time.sleep(0.05)
    owner.kill()
    owner.wait()
    assert gone(int(pid)) and not Path(folder).exists()


def test_a_dead_child_is_told_of() -> None:
    engine = SGLangEngine(start, Room(40, 4, 1))
    with pytest.raises(RuntimeError, match="has ended"):
        engine.command("kill")
    engine.close()


@pytest.mark.parametrize("way, words", [("refuse", "no room on the device"), ("die", "a library is missing")])
def test_a_child_that_does_not_start_is_one_refusal(way: str, words: str, capfd) -> None:
    with pytest.raises(DependencyError, match="SGLang did not start") as found:
        SGLangEngine(lambda: start(way), Room(40, 4, 1))
    assert "\n" not in str(found.value)
    assert words in str(found.value) + capfd.readouterr().err


def test_an_interpreter_that_is_not_there_is_one_refusal_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    """On this host, as it may be: where it was asked for SGLang was another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    (tmp_path / "data").write_text("")
    for name, words in (("none", "No such file"), ("data", "Permission denied")):
        with pytest.raises(DependencyError, match=f"cannot be run on .*{words}") as found:
            Child(server_command(str(tmp_path / name)), settings())
        assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and set(os.listdir("/proc/self/fd")) == before


def of_two_ranks():
    """A replica of two tensor-parallel ranks: one child, the same traces and the same failures on both."""
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    groups = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    engine = SGLangEngine(start, Room(40, 4, 100, 8), groups.tp)
    traces = engine.run(requests(SAMPLING, 4))
    engine.submit(requests(dataclasses.replace(SAMPLING, max_new_tokens=30, ignore_eos=True), 3))
    aborted = []
    while not aborted:
        aborted = engine.step()
    aborted += engine.abort()
    try:
        engine.command("fail")
        failure = None
    except RuntimeError as error:
        failure = str(error)
    children = engine.child is not None
    engine.close()
    found = [(trace.prompt_key, trace.response_ids.tolist(), trace.steps.tolist()) for trace in traces + aborted]
    return children, engine.kv_cache_bytes, found, failure


def test_ranks_of_a_replica_share_one_child(model) -> None:
    (first, *one), (second, *other) = pool(2).run(of_two_ranks)
    assert (first, second) == (True, False) and one == other
    cache, found, failure = one
    assert cache == 64000 and "as asked" in failure and 4 < len(found) <= 4 + 3
    naive = {request.prompt_key: generate(model, request).response for request in requests(SAMPLING, 4)}
    assert {key: tokens for key, tokens, _ in found[:4]} == naive


def test_devices_of_the_child(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices([2, 3]) == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc,6")
    assert visible_devices([1, 2]) == "GPU-abc,6"


def test_sampling_parameters_of_sglang_change_nothing() -> None:
    """The decisions are ours: SGLang's own parameters are neutral but for the end of a response."""
    from megatron_dlm.rollout.sglang.traces import order_for

    sampling = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, stop_token_ids=(7, 5), max_new_tokens=9)
    order = order_for(Request(np.array([1, 2]), sampling, "p", 0, 42), "n")
    custom = order["sampling"].pop("custom_params")
    assert order == {
        "name": "n",
        "prompt": [1, 2],
        "sampling": dict(max_new_tokens=9, stop_token_ids=[5, 7], ignore_eos=False, temperature=1.0, stream_interval=1),
    }
    assert (custom["stream"], custom["temperature"], custom["top_k"], custom["top_p"]) == (42, 0.0, 3, 0.5)
