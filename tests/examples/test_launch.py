"""What an example starts, and how: alone, on several hosts, under Slurm and torchrun; signals, exit codes, paths."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.examples.recorder import EXAMPLES, ROOT, SCRIPTS, Recorder, environment, finish

STEP = {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[07-10]", "SLURM_NODEID": "2", "SLURM_JOB_ID": "31234"}
TORCHRUN = ["-m", "torch.distributed.run"]
RANK = ["-u", "-m", "megatron_dlm"]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def commands_of(path: Path, **texts: str) -> str:
    """A folder of small programs, first on PATH."""
    path.mkdir()
    for name, text in texts.items():
        (path / name.replace("_", "-")).write_text(f"#!/bin/bash\n{text}\n")
        (path / name.replace("_", "-")).chmod(0o755)
    return f"{path}:{os.environ['PATH']}"


def saved(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_needs_no_launcher(recorder: Recorder, script: str) -> None:
    recorder.start(script, NPROC_PER_NODE="1")
    (call,) = recorder.calls
    assert call.argv[:3] == RANK
    assert call.env["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert call.env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_one_host(recorder: Recorder) -> None:
    recorder.start("sft_8b.sh", NPROC_PER_NODE="8")
    (call,) = recorder.calls
    assert call.argv[:6] == [*TORCHRUN, "--standalone", "--nproc-per-node", "8", "-m"]
    assert call.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_the_gpus_of_a_host_are_counted(recorder: Recorder, tmp_path: Path) -> None:
    slowly = "echo 'GPU 0: one'; sleep 0.2; echo 'GPU 1: two'"  # the list is not read only to its first line
    path = commands_of(tmp_path / "bin", nvidia_smi=slowly)
    recorder.start("sft_8b.sh", PATH=path)
    assert recorder.calls[0].argv[2:5] == ["--standalone", "--nproc-per-node", "gpu"]


def test_several_hosts(recorder: Recorder) -> None:
    recorder.start("sft_8b.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="alpha", MASTER_PORT="7", NPROC_PER_NODE="8")
    meeting = "--nnodes 2 --node-rank 1 --master-addr alpha --master-port 7 --nproc-per-node 8 -m megatron_dlm"
    assert recorder.calls[0].argv[2:14] == meeting.split()


def test_slurm_with_a_task_per_host(recorder: Recorder, tmp_path: Path) -> None:
    path = commands_of(tmp_path / "bin", scontrol='[ "$*" = "show hostnames gpu[07-10]" ] && printf "gpu07\\ngpu08\\n"')
    recorder.start("sft_8b.sh", PATH=path, SLURM_STEP_NUM_TASKS="4", SLURM_GPUS_ON_NODE="8", **STEP)
    meeting = "--nnodes 4 --node-rank 2 --master-addr gpu07 --master-port 21234 --nproc-per-node 8"
    assert recorder.calls[0].argv[2:12] == meeting.split()


def test_slurm_with_a_task_per_gpu(recorder: Recorder, tmp_path: Path) -> None:
    path = commands_of(tmp_path / "bin", scontrol="echo gpu07")
    recorder.start("sft_8b.sh", PATH=path, SLURM_STEP_NUM_TASKS="32", SLURM_PROCID="17", SLURM_LOCALID="1", **STEP)
    (call,) = recorder.calls
    assert call.argv[:3] == RANK
    place = {name: call.env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert place == dict(RANK="17", LOCAL_RANK="1", WORLD_SIZE="32", MASTER_ADDR="gpu07", MASTER_PORT="21234")


@pytest.mark.parametrize(
    "more, words",
    [
        ({"SLURM_JOB_NUM_NODES": "4"}, "This Slurm job has 4 hosts, and this script runs on one of them."),
        ({"NNODES": "2"}, "NNODES is 2, and MASTER_ADDR is not set."),
        ({"SIZE": "small"}, "SIZE is small. Use full (the default) or tiny."),
        ({"PYTHON": "/no/python"}, "There is no /no/python here."),
    ],
)
def test_mistakes_end_in_a_sentence(recorder: Recorder, more: dict[str, str], words: str) -> None:
    assert words in recorder.start("tracerl_8b.sh", expect=2, **more)
    assert not recorder.calls


def test_a_dry_run_starts_one_process_wherever_it_is(recorder: Recorder) -> None:
    recorder.start("tracerl_8b.sh", "--dry-run", "--dry-run-world-size", "64", SLURM_JOB_NUM_NODES="4", NNODES="8")
    assert recorder.calls[0].argv[:3] == RANK


@pytest.mark.parametrize("no_python", [False, True])
def test_torchrun_starts_the_script_on_each_rank(recorder: Recorder, no_python: bool) -> None:
    """What torchrun executes, without torchrun; the interpreter is the one that torchrun runs in, if it says so."""
    link = recorder.work / "a link.sh"
    link.symlink_to(EXAMPLES / "sft_8b.sh")
    program = [link] if no_python else [sys.executable, "-u", link]
    first = f"{recorder.python.parent}:{os.environ['PATH']}"
    python = {"PYTHON": str(recorder.python)} if no_python else {"PATH": first}
    place = dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="alpha", MASTER_PORT="7")
    # Without --no-python the real interpreter is handed on: it is to say what it was given, and no more.
    flags = ["--lr", "two words", "--no-such-flag"]
    done = subprocess.run(
        [*program, *flags], cwd=recorder.work, env=environment(**place, **python), capture_output=True, text=True
    )
    if no_python:
        (call,) = recorder.calls
        assert done.returncode == 0 and call.argv[:3] == RANK and call.command[-3:] == flags
        assert {name: call.env[name] for name in place} == place
    else:
        assert done.returncode == 2 and not recorder.calls
        assert "ConfigError: sft has no flag --no-such-flag." in done.stderr, done.stderr


def test_paths_and_words_with_blanks(recorder: Recorder) -> None:
    odd = recorder.folder / "a copy's place"
    shutil.copytree(EXAMPLES, odd / "examples")
    words = ["--prompt-template", 'Say "{question}" $HOME `x` \\n\'', "--wandb-exp-name", "", "*"]
    recorder.start(odd / "examples" / "tracerl_8b.sh", *words, DATA="my data.jsonl", SAVE="my runs/$x")
    (call,) = recorder.calls
    assert call.command[-5:] == words
    assert call.flags["--prompt-data"] == "my data.jsonl" and call.flags["--save"] == "my runs/$x"
    assert call.flags["--config"] == str(odd / "configs" / "tracerl_8b_math.yaml")
    assert call.env["PWD"] == str(recorder.work)


def test_sizes_come_from_the_environment(recorder: Recorder) -> None:
    layout = dict(TP="4", PP="2", VPP="3", CP="2", EP="16")
    recorder.start("tracerl_30b_a3b.sh", **layout, STEPS="7", ROW="999", MODEL="tiny-moe", BATCH="")
    flags = recorder.calls[0].flags
    wanted = {"--tensor-model-parallel-size": "4", "--pipeline-model-parallel-size": "2", "--num-rollout": "7"}
    wanted |= {"--num-virtual-stages-per-pipeline-rank": "3", "--context-parallel-size": "2"}
    wanted |= {"--expert-model-parallel-size": "16", "--max-tokens-per-row": "999", "--model-preset": "tiny-moe"}
    assert {name: flags[name] for name in wanted} == wanted
    assert flags["--global-batch-size"] == "128"  # an empty variable is none
    assert "--sequence-parallel" in flags and "--no-sequence-parallel" not in flags
    recorder.start("tracerl_8b.sh", TP="1")
    flags = recorder.calls[1].flags
    assert "--no-sequence-parallel" in flags and "--num-virtual-stages-per-pipeline-rank" not in flags
    assert "--expert-model-parallel-size" not in flags


def test_a_run_goes_on_and_another_begins(recorder: Recorder) -> None:
    def source() -> list[str]:
        recorder.start("tracerl_8b.sh", SAVE="new", CHECKPOINT="old")
        words = recorder.calls[-1].command
        return words[words.index("sdar-8b") + 1 : words.index("--save")]

    assert source() == ["--hf-checkpoint", "old"]
    saved(recorder.work / "old", 5)
    assert source() == ["--load", "old", "--finetune"]
    saved(recorder.work / "new", 5)
    assert source() == ["--load", "new"]


@pytest.mark.parametrize("code", [2, 143])
@pytest.mark.parametrize("script", ["tracerl_8b.sh", "block_expansion_8b.sh"])
def test_exit_codes(recorder: Recorder, script: str, code: int) -> None:
    recorder.start(script, expect=code, THEN=f"exit {code}")
    assert len(recorder.calls) == 1


def test_the_second_phase_follows_the_first(recorder: Recorder) -> None:
    then = "[[ $* != *phase1.yaml* ]] || { mkdir -p s/phase1; echo 60 > s/phase1/latest_checkpointed_iteration.txt; }"
    launcher = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="alpha", MASTER_PORT="7000")
    recorder.start("block_expansion_8b.sh", "--seed", "5", SAVE="s", THEN=then, **launcher)
    first, second = recorder.calls
    assert first.flags["--config"].endswith("phase1.yaml") and first.flags["--hf-checkpoint"].endswith("SDAR-8B-Chat")
    assert second.flags["--config"].endswith("phase2.yaml") and second.flags["--load"] == "s/phase1"
    assert "--finetune" in second.flags and (first.flags["--seed"], second.flags["--seed"]) == ("5", "5")
    assert (first.flags["--num-rollout"], second.flags["--num-rollout"]) == ("60", "40")
    # The store of torchrun still has the addresses of the first job's processes.
    assert (first.env["MASTER_PORT"], second.env["MASTER_PORT"]) == ("7000", "7001")
    assert "TORCHELASTIC_USE_AGENT_STORE" not in first.env and second.env["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    recorder.start("block_expansion_8b.sh", SAVE="s")
    assert len(recorder.calls) == 3 and recorder.calls[2].flags["--config"].endswith("phase2.yaml")


def test_no_second_phase_where_the_first_was_told_to_stop_early(recorder: Recorder) -> None:
    then = "mkdir -p s/phase1; echo 59 > s/phase1/latest_checkpointed_iteration.txt"
    recorder.start("block_expansion_8b.sh", SAVE="s", THEN=then)
    assert len(recorder.calls) == 1


@pytest.mark.parametrize("script", ["tracerl_8b.sh", "block_expansion_8b.sh"])
@pytest.mark.parametrize("sent, got", [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")])
def test_signals_reach_the_trainer(recorder: Recorder, script: str, sent: signal.Signals, got: str) -> None:
    """To the script alone; what the trainer then says and its exit code come through."""
    if script == "block_expansion_8b.sh":
        got = "TERM"  # a job in the background ignores SIGINT, so it is told otherwise
    then = f"trap 'sleep 0.1; echo told >&2; exit 77' {got}; touch ready; while true; do sleep 0.02; done"
    process = recorder.popen(script, THEN=then)
    try:
        deadline = time.monotonic() + 60
        while not (recorder.work / "ready").exists():
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said.strip()) == (77, "told") and len(recorder.calls) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left


def test_two_jobs_within_one_torchrun_meet(recorder: Recorder) -> None:
    """Real processes and a real rendezvous; the job is a sum over the ranks."""
    (recorder.folder / "job.py").write_text(
        "import json, os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1) * (dist.get_rank() + 1)\n"
        "dist.all_reduce(total)\n"
        "said = json.dumps([dist.get_rank(), total.item(), 'phase2.yaml' in ' '.join(sys.argv)])\n"
        "os.write(1, f'{said}\\n'.encode())\n"
        "dist.destroy_process_group()\n"
    )
    then = f'"{sys.executable}" "{recorder.folder}/job.py" "$@" && mkdir -p s/phase1 && echo 60 > '
    then += "s/phase1/$RANK.txt && mv s/phase1/$RANK.txt s/phase1/latest_checkpointed_iteration.txt"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    env = environment(PYTHON=str(recorder.python), THEN=then, SAVE="s")
    words = [*words, EXAMPLES / "block_expansion_8b.sh"]
    done = finish(words, recorder.work, env, limit=120)
    assert done.returncode == 0, done.stderr
    said = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert said == [[0, 3.0, False], [0, 3.0, True], [1, 3.0, False], [1, 3.0, True]]
