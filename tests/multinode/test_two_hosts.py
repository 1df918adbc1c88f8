"""Jobs over two hosts that share a network and one folder: they compute what one host computes, and when one of them is
lost, or lacks something, the other ends soon with a sentence that says so.

Where a launcher is part of the question it is torchrun; elsewhere processes are started with the variables that any
launcher sets.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.bad_inputs.bench import SFT
from tests.multinode.hosts import Host, Job, Refused, free_port, two_hosts, until
from tests.test_commands import lines
from tests.test_rl_commands import RL
from tests.test_stopping import saved_iterations, tensors

TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
ENDLESS = "--train-iters 100000 --log-interval 1 --save-interval 1 "


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[Path, Host, Host]]:
    folder = tmp_path_factory.mktemp("hosts")
    try:
        with two_hosts(folder) as hosts:
            _fill(folder)
            yield folder, *hosts
    except Refused as refused:
        pytest.skip(f"no hosts of namespaces here: {refused}")


@pytest.fixture
def hosts(lab) -> Iterator[tuple[Path, Host, Host]]:
    """The shared folder, which is the working directory of all jobs, and the hosts; nothing runs there after a test."""
    yield lab
    for host in lab[1:]:
        host.kill()
        host.cable(up=True)


def _fill(folder: Path) -> None:
    from megatron_dlm.data.train_tokenizer import train_tokenizer

    pairs = [(a, b) for a in range(5) for b in range(5)]
    sft = [{"question": f"{a}+{b}=", "response": f"\\boxed{{{a + b}}}"} for a, b in pairs]
    prompts = [{"question": f"{a}+{b}=", "ground_truth_answer": str(a + b)} for a, b in pairs]
    (folder / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sft))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    words = [record["question"] + record["response"] for record in sft]
    train_tokenizer(words, 270, folder / "tokenizer", ["\\boxed{", "}"])


def launch(command: str, hosts: Sequence[Host], per_host: int = 1, **environment: str) -> list[Job]:
    """One job over these hosts, by rank."""
    port, world = free_port(), per_host * len(hosts)
    places = [host for host in hosts for _ in range(per_host)]
    return [
        host.start(shlex.split(command), rank, port, world, per_host, **environment)
        for rank, host in enumerate(places)
    ]  # fmt: skip


def finish(jobs: Sequence[Job], code: int = 0) -> list[str]:
    """What they said, once all have ended with this code."""
    codes = [job.wait() for job in jobs]
    said = [job.said() for job in jobs]
    assert codes == [code] * len(jobs), "\n".join([str(codes), *said])
    return said


def sentences(said: str) -> list[str]:
    """The lines that tell errors."""
    return re.findall(r"^[A-Z]\w+Error: .*$", said, re.MULTILINE)


def latest(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


def same(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and any("exp_avg" in name for name in left)
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout, by_torchrun", [("tp", True), ("pp", False)])
def test_tracerl_over_two_hosts_is_that_of_one(hosts, layout: str, by_torchrun: bool) -> None:
    """Rollout, update, refit and checkpoint: the same losses, the same weights and optimizer to the last bit."""
    folder, a, b = hosts
    words = RL + {"tp": TP, "pp": PP}[layout] + "--num-rollout 2 --verify-refit "
    two, one = f"{layout}-two", f"{layout}-one"
    if by_torchrun:
        port = free_port()
        jobs = [host.torchrun(shlex.split(words + f"--save {two}"), port) for host in (a, b)]
    else:
        jobs = launch(words + f"--save {two}", (a, b))
    said = finish(jobs)
    assert sum(f"Saved iteration 2 to {two}" in part for part in said) == 1
    finish(launch(words + f"--save {one}", [a], per_host=2))
    assert same(folder / two / "iter_0000002", folder / one / "iter_0000002")
    found, expected = (lines(folder / name / "metrics.jsonl") for name in (two, one))
    for here, there in zip(found, expected, strict=True):
        timed = {name for name in here if name.startswith(("perf/", "memory/", "seconds"))} - {"perf/refit_bytes"}
        assert len(here) - len(timed) > 20 and here.keys() == there.keys()
        assert [(name, here[name], there[name]) for name in here.keys() - timed if here[name] != there[name]] == []
    assert (found[-1]["perf/refit_bytes"] > 0) == (layout == "pp")


def test_two_processes_on_each_of_two_hosts(hosts) -> None:
    """Each model within a host, gradients between them."""
    folder, a, b = hosts
    words = "sft " + SFT + TP + "--use-distributed-optimizer --seed 5 "
    finish(launch(words + "--save four-two", (a, b), per_host=2))
    finish(launch(words + "--save four-one", [a], per_host=4))
    assert same(folder / "four-two" / "iter_0000003", folder / "four-one" / "iter_0000003")


def test_a_host_that_dies_and_comes_back(hosts) -> None:
    """Under torchrun: the other host ends with one sentence; the same command with --load goes on with both."""
    folder, a, b = hosts
    words, port = shlex.split("sft " + SFT + TP + ENDLESS + "--save dies"), free_port()
    survivor, _ = (host.torchrun(words, port) for host in (a, b))
    survivor.wait_for("Saved iteration 2 to dies")
    b.kill()
    assert survivor.wait() == 1  # torchrun's own
    (sentence,) = sentences(survivor.said())
    assert sentence.startswith("PeerError: The processes on host-b (10.77.0.2) have ended or cannot be reached")
    assert "exitcode  : 75" in survivor.said() and survivor.said().count("Traceback") <= 1  # torchrun's own
    before, port = latest(folder / "dies"), free_port()
    assert before in saved_iterations(folder / "dies")
    words += ["--load", "dies", "--train-iters", before + 2]
    said = finish([host.torchrun(words, port) for host in (a, b)])
    assert f"iteration {before + 1:8d}/" in said[0] and latest(folder / "dies") == before + 2
    assert not list((folder / "dies").glob(".iter_*.partial"))


def test_a_cable_that_is_pulled(hosts) -> None:
    """No word comes through any more, and nobody is told that: each side notices the other's silence."""
    folder, a, b = hosts
    jobs = launch("sft " + SFT + ENDLESS + "--save cut --host-timeout-seconds 10", (a, b))
    jobs[0].wait_for("Saved iteration 2 to cut")
    b.cable(up=False)
    left, right = (sentences(said) for said in finish(jobs, code=75))
    assert len(left) == len(right) == 1
    assert left[0].startswith("PeerError: The host host-b (10.77.0.2) has not been heard of for 10 seconds")
    # Which is noticed first there is a matter of luck: no word of the host, or no word of the store that it keeps.
    assert right[0].startswith("PeerError: The host host-a")
    assert "which keeps the job's store," in right[0] or "has not been heard of for 10 seconds" in right[0]
    assert latest(folder / "cut") in saved_iterations(folder / "cut")


def test_a_host_with_a_disk_of_its_own(hosts) -> None:
    folder, a, b = hosts
    for said in finish(launch("sft " + SFT + "--save own/out", (a, b)), code=2):
        (sentence,) = sentences(said)
        assert "--save own/out is not one folder: what host-a writes there, host-b does not see." in sentence
    for name in ("a", "b"):
        assert [path for path in (folder / f"own-{name}").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("who", ["a", "b"])
@pytest.mark.parametrize("what, flag", [("sft.jsonl", "--data-path"), ("tokenizer", "--tokenizer-model")])
def test_what_only_one_host_has(hosts, what: str, flag: str, who: str) -> None:
    """The one that lacks it, host `who`, says so, and the other one says the same and does not wait."""
    folder, *both = hosts
    for name in ("a", "b"):
        there = folder / f"own-{name}" / what
        shutil.rmtree(there) if there.is_dir() else there.unlink(missing_ok=True)
        if name != who:
            (shutil.copytree if (folder / what).is_dir() else shutil.copy)(folder / what, there)
    jobs = launch("sft " + SFT + f"{flag} own/{what} --host-timeout-seconds 20", both)
    for job, said in zip(jobs, finish(jobs, code=2)):
        (sentence,) = sentences(said)
        assert sentence.startswith("DataError: ") and f"own/{what}" in sentence
        assert job.host.name == who or sentence.endswith(f" on host-{who})")


def test_an_interface_that_is_not_there(hosts) -> None:
    _, a, b = hosts
    for said in finish(launch("sft " + SFT, (a, b), GLOO_SOCKET_IFNAME="eth7"), code=2):
        (sentence,) = sentences(said)
        assert "GLOO_SOCKET_IFNAME names eth7, and host-" in sentence and "has lo, net0" in sentence


def test_nothing_is_left_over(tmp_path) -> None:
    """What a host runs ends with the test's link to it, whatever it does about that."""
    try:
        with two_hosts(tmp_path) as (a, _):
            stubborn = a.start(["sh", "-c", "trap '' TERM HUP INT; touch here; sleep 987654.321"], command=False)
            until(lambda: (tmp_path / "here").exists(), 30, stubborn)
    except Refused as refused:
        pytest.skip(f"no hosts of namespaces here: {refused}")
    commands = [path.read_bytes() for path in _command_lines()]
    assert not [line for line in commands if b"987654.321" in line or str(tmp_path).encode() in line]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def _command_lines() -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
