"""Traces of the steps, ranks and phases that were asked for; what is left by a run that was short of memory."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.profile import ProfileConfig, TrainingProfileConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.config.validate_profile import check_profile_here
from megatron_dlm.training import profile
from megatron_dlm.training.pace import Pace
from tests.bad_inputs.bench import BASES
from tests.bad_inputs.conftest import pristine, server  # noqa: F401 (fixtures)
from tests.command_server import command_server
from tests.sft.test_trainer import SFT, make_trainer
from tests.tiny import quiet

STEPS = dict(profile=True, profile_step_start=1, profile_step_end=3)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:  # noqa: F811
    shutil.copytree(pristine, tmp_path / "world")
    return tmp_path / "world"


def ranges(file: Path) -> set[str]:
    """Names of the ranges that somebody has set in a trace."""
    with gzip.open(file, "rt") as lines:
        events = json.load(lines)["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def run(words: str, folder: Path, ranks: int = 1) -> str:
    result = command_server().run(shlex.split(words), folder, ranks=ranks)
    assert result.codes == [0] * ranks, result.stdout + result.stderr
    return result.stdout


def work(steps: int, tmp_path: Path, rank: int = 0, **settings: object) -> list[str]:
    """A made-up run; what it says."""
    said: list[str] = []
    with profile.profiling(TrainingProfileConfig(**STEPS | settings), str(tmp_path / "traces"), rank, said.append):
        for step in range(steps):
            profile.begin_step(step)
            with profile.phase("rollout"):
                for _ in range(3):
                    with profile.span("model"):
                        torch.ones(3) + 1
                    profile.after_pass()
            for _ in range(2):
                with profile.phase("train"), profile.span("optimizer"):
                    torch.ones(3) * 2
    return said


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {f"step{n}_{name}_rank0.json.gz" for n in (2, 3) for name in ("rollout", "train")}),
        (dict(profile_step_end=2, profile_phases=["rollout"]), {"step2_rollout_rank0.json.gz"}),
        (dict(profile_ranks=[1]), set()),
        (dict(profile_ranks=[0, 1], profile_step_start=3, profile_step_end=9), {"step4_train_rank0.json.gz"}),
        (dict(profile=False), set()),
    ],
)
def test_files_of_what_was_asked_for(tmp_path, settings, expected) -> None:
    said = work(4, tmp_path, **settings)
    found = files(tmp_path / "traces")
    assert {name for name in found if "_2.json" not in name} >= expected
    assert {name.split("_")[0] for name in found} == {name.split("_")[0] for name in expected}
    if settings.get("profile_phases"):
        assert found == expected
    elif found:  # the phase came twice in each step
        assert sum(name.endswith("train_rank0_2.json.gz") for name in found) == len(found) // 3
    assert bool(said) == settings.get("profile", True)


def test_a_phase_holds_its_spans_and_its_passes_end(tmp_path) -> None:
    said = work(2, tmp_path, profile_passes=2, profile_step_end=2)
    traces = tmp_path / "traces"
    assert ranges(traces / "step2_train_rank0.json.gz") == {"train", "optimizer"}
    with gzip.open(traces / "step2_rollout_rank0.json.gz", "rt") as lines:
        events = json.load(lines)["traceEvents"]
    assert sum(event["name"] == "model" for event in events) == 2, "the third pass is left out"
    assert said == [f"Traces of step 2 (rank 0) are in {traces}; ui.perfetto.dev shows them."]
    assert work(1, tmp_path) == ["No step was traced: --profile asks for steps 2 to 3, and the last one was 1."]


def test_it_says_where_traces_are_only_if_some_were_written(tmp_path) -> None:
    def said_of(rank: int, *phases: str, **settings: object) -> str:
        said: list[str] = []
        config = TrainingProfileConfig(**STEPS | dict(profile_step_end=4) | settings)
        with profile.profiling(config, str(tmp_path / "traces"), rank, said.append):
            for step, name in enumerate(phases):
                profile.begin_step(step)
                with profile.phase(name):
                    pass
        return said[0]

    nothing = "Nothing was traced: --profile-phases asks for eval; the phases that came were train, rollout."
    for rank in (0, 1):  # rank 1 writes nothing, and rank 0 says what all do
        assert said_of(rank, "eval", "train", "rollout", "train", profile_phases=["eval"]) == nothing
        assert not (tmp_path / "traces").exists()
    for rank in (1, 0):
        said = said_of(rank, "train", "train", "rollout", "train", profile_phases=["rollout"])
        assert said.startswith("Traces of step 3 (rank 0) are in ")
        assert files(tmp_path / "traces") == ({"step3_rollout_rank0.json.gz"} if rank == 0 else set())
    alone: list[str] = []
    with profile.profiling(ProfileConfig(profile=True), str(tmp_path / "more"), 0, alone.append):
        pass
    assert alone == ["Nothing was traced; no phase came."] and not (tmp_path / "more").exists()


def test_a_phase_that_fails_keeps_its_error_and_ends_the_recording(tmp_path) -> None:
    settings = ProfileConfig(profile=True)
    with pytest.raises(KeyError), profile.profiling(settings, str(tmp_path), 0), profile.phase("eval"):
        raise KeyError
    assert files(tmp_path) == set()
    with profile.profiling(settings, str(tmp_path), 0), profile.phase("eval"):
        pass
    assert files(tmp_path) == {"eval_rank0.json.gz"}


def test_what_is_not_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="--nvtx-ranges"):
        check_profile_here(ProfileConfig(nvtx_ranges=True), 1, gpu=False)
    check_profile_here(ProfileConfig(nvtx_ranges=True, profile_ranks=[7]), 1, gpu=True)
    with pytest.raises(ConfigError, match="--profile-ranks has 7.*Give ranks up to 1"):
        check_profile_here(ProfileConfig(profile=True, profile_ranks=[0, 7]), 2, gpu=True)


def test_ranges_of_nsight_where_there_is_a_gpu(monkeypatch) -> None:
    """The calls of torch, recorded: this host has no GPU."""
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("end"))
    with profile.profiling(ProfileConfig(nvtx_ranges=True), None, 0), profile.phase("train"):
        with profile.span("optimizer"):
            pass
    assert calls == ["train", "optimizer", "end", "end"]
    with profile.phase("train"):
        pass
    assert len(calls) == 4


def test_two_processes_and_a_run_that_is_resumed(folder) -> None:
    """Rank 1 alone writes. Steps are counted over the whole run: its first two were made before."""
    words = BASES["resume"] + " --profile --profile-step-start 1 --profile-step-end 3 --profile-ranks 1"
    said = run(words, folder, ranks=2)
    assert files(folder / "ckpt" / "profile") == {"step3_train_rank1.json.gz"}
    assert "Traces of step 3 (rank 1) are in ckpt/profile" in said
    names = ranges(folder / "ckpt" / "profile" / "step3_train_rank1.json.gz")
    assert {"train", "rows", "forward and backward", "optimizer"} <= names


def test_the_phases_of_an_rl_step_and_of_a_generation(folder) -> None:
    words = BASES["tracerl"] + " --profile --profile-step-start 0 --profile-dir traces --n-samples-per-prompt 4 "
    words += "--min-group-accuracy 0 --max-group-accuracy 1 --overlong-margin 0 --format-reward '.*[0-5a-p].*'"
    run(words, folder)
    phases = {name.removeprefix("step1_").removesuffix("_rank0.json.gz") for name in files(folder / "traces")}
    assert phases == {"rollout", "reward", "old_logprobs", "train", "update_weights"}
    assert {"rollout", "schedule", "model", "sample"} <= ranges(folder / "traces" / "step1_rollout_rank0.json.gz")
    said = run(BASES["generate"] + " --profile --profile-dir more", folder)
    assert files(folder / "more") == {"rollout_rank0.json.gz"} and "Traces (rank 0) are in more" in said


def test_a_shortage_of_memory_is_told_with_its_ledger(tmp_path, monkeypatch, capsys) -> None:
    """In the second step of a fine-tuning run, as the command line would tell it."""
    from megatron_dlm import __main__

    trainer = make_trainer(dataclasses.replace(SFT, train_iters=3))
    step = trainer.step

    def short_of_memory():
        if trainer.state.iteration:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return step()

    trainer.step = short_of_memory
    settings = TrainingProfileConfig(memory_snapshot_dir=str(tmp_path / "left"))

    def command(argv: list[str]) -> None:
        with quiet() as report, profile.profiling(settings, None, 0, report.say):
            trainer.run(report, LoggingConfig(), Pace(TrainingRunConfig(), lambda *call: None))

    monkeypatch.setattr("importlib.import_module", lambda name: type("Command", (), {"main": staticmethod(command)}))
    assert __main__.main(["sft"]) == 2
    told, written = capsys.readouterr().err, (tmp_path / "left" / "memory_rank0.txt").read_text()
    assert f"This table is in {tmp_path}/left/memory_rank0.txt." in told
    assert told.count("ResourceError: There is not enough memory (CUDA out of memory.") == 1
    lines = written.splitlines()
    assert lines[0] == "Device memory of this rank, by phase:" and lines[1].startswith("  after train: parameters")
    assert lines[-1].startswith("  now: ") and all(line in told for line in lines)


def test_the_allocator_is_recorded_and_dumped_where_there_is_a_gpu(tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(profile.platform, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: calls.append(name))
    with profile.profiling(ProfileConfig(memory_snapshot_dir=str(tmp_path)), None, 3):
        assert profile.keep_shortage("a table").count(str(tmp_path)) == 2
    snapshot = str(tmp_path / "memory_rank3.pickle")
    assert calls == [dict(max_entries=profile.HISTORY, stacks="python"), snapshot, dict(enabled=None)]
    assert profile.keep_shortage("a table") is None


def test_a_place_that_is_gone_does_not_hide_the_shortage(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with profile.profiling(ProfileConfig(memory_snapshot_dir=str(tmp_path / "file")), None, 0):
        assert "could not be written to" in profile.keep_shortage("a table")
