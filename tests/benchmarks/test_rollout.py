"""benchmarks/rollout.py at tiny sizes: what it counts, what it refuses, and what it makes of its figures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import rollout, rollout_worker
from benchmarks.plain_loop import Shape
from benchmarks.rollout_cases import SIZES, Job, shape_of, small_case
from benchmarks.rollout_report import limits, report, summary
from benchmarks.rollout_worker import Bench, Generated
from benchmarks.roofline import HARDWARE, known, matrix_parameters, seconds_of_a_pass, tokens_per_second
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.options import EngineOptions
from tests.bad_inputs.bench import tells_what_to_do
from tests.benchmarks.test_benchmarks import SMALL, run
from tests.diffusion.oracles import PAD_ID
from tests.tiny import make_model, vocabulary

TINY = [*SMALL, "--ffn-hidden-size", 48, "--device", "cpu", "--threads", 1, "--prompt-lengths", 5, 20]
TINY += ["--prompts", 3, "--samples", 4, "--response-length", 10, "--plain-every", 4, "--batches", 6, 1]
TINY += ["--budgets", 512, 16, "--page-sizes", 16, 3, "--repeats", 1]


def test_every_contestant_makes_the_same_and_is_counted_for_what_it_did(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kinds = ["--dtype", "bf16", "--weights", "trained", "fp8"]
    code = rollout.main([*map(str, TINY), *kinds, "--json", str(tmp_path / "figures.json")])
    said = capsys.readouterr()
    assert code == 0, said.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    prompts = [5 + int(n * math.sqrt(2) % 1 * 16) for n in range(3)]
    assert len(set(prompts)) == 3 and all(5 <= length <= 20 for length in prompts)
    blocks = [math.ceil((length + 10) / 4) - length // 4 for length in prompts]
    full = [length // 4 * 4 for length in prompts]
    # Static unmasks a token per step, to the end of the last block; all blocks but the last are committed.
    steps = [4 * (length // 4 + more) - length for length, more in zip(prompts, blocks)]
    for result in figures["results"]:
        found = {one["name"]: one for one in result["contestants"]}
        assert list(found) == [
            *("plain loop", "engine", "prompts not shared", "commits apart", "head everywhere"),
            *("1 running", "16 tokens a pass", "pages of 3", "weights fp8"),
        ]
        for name, one in found.items():
            responses = 3 if name == "plain loop" else 8 if name == "1 running" else 12
            times = [1, 1, 1] if responses == 3 else [4, 4, responses - 8]
            total = lambda each, times=times: sum(n * value for n, value in zip(times, each))
            assert one["responses"] == responses and one["tokens"] == 10 * responses
            assert one["blocks"] == total(blocks) and one["prompt_tokens"] == total(full)
            shared = name not in ("plain loop", "prompts not shared")
            assert one["prefilled"] == (sum(full[: 2 if responses == 8 else 3]) if shared else total(full))
            commits = one["blocks"] - responses if name in ("plain loop", "commits apart") else 0
            assert one["forwards"] == one["steps"] + commits
            if result["remasking"] == "static":
                assert one["steps"] == total(steps)
            assert len(one["seconds"]) == 1 and one["passes"] > 0 and one["ratio"] > 0
            assert bool(one["phases"]) == (name != "plain loop")
        assert found["plain loop"]["ratio"] == 1 and len(result["speed_up"]["best"]) == 1
        assert found["1 running"]["passes"] > found["engine"]["passes"] >= max(steps) // 4
    static, dynamic = ({one["name"]: one["steps"] for one in result["contestants"]} for result in figures["results"])
    assert dynamic["engine"] < static["engine"]
    assert said.out.count("times as fast as the plain loop") == 2 and "limit" not in said.out


BAD = {
    "weights": (["--dtype", "fp32", "--weights", "fp8"], "--weights fp8 needs --dtype bf16"),
    "lengths": (["--prompt-lengths", "9", "4"], "--prompt-lengths 9 4"),
    "steps": (["--denoising-steps", "5"], "--denoising-steps 5"),
    "steps of a block": (["--block-size", "8", "--denoising-steps", "9"], "8 tokens of a block"),
    "heads": (["--num-query-groups", "4"], "--num-query-groups 4 does not divide the 6"),
    "threshold": (["--threshold", "1.5"], "--threshold 1.5"),
    "not a number": (["--threshold", "nan"], "--threshold nan"),
    "temperature": (["--temperature", "-1"], "--temperature -1"),
    "top-k": (["--top-k", "-1"], "--top-k -1"),
    "top-p": (["--top-p", "0"], "--top-p 0"),
    "head scale": (["--head-scale", "0"], "--head-scale 0"),
    "half a roofline": (["--flops", "1e12"], "--bandwidth and --flops"),
    "no bandwidth": (["--flops", "1e12", "--bandwidth", "0"], "--bandwidth 0"),
    "no folder": (["--json", "nowhere/figures.json"], "--json nowhere/figures.json"),
    "a folder": (["--json", "."], "--json ."),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused_before_any_work(flags: list[str], says: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(rollout, "Worker", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rollout.main(["--device", "cpu", *flags]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert says in error and tells_what_to_do(error.strip())


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--preset", "9b"], ["--threads", "-1"], ["--without", "speed"]])
def test_unknown_names_and_impossible_numbers_are_refused(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        rollout.main(flags)
    assert stopped.value.code == 2 and flags[1] in capsys.readouterr().err


def test_without_a_gpu_none_can_be_asked_for() -> None:
    done = run("rollout.py", "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "needs a GPU" in done.stderr


def test_no_speed_is_shown_when_tokens_differ(capsys, monkeypatch) -> None:
    class Liar:
        def ask(self, name: str, *_: object) -> list[str]:
            assert name == "different"  # and nothing is asked after that
            return ["engine, static: 1 of 10 responses differ"]

    monkeypatch.setattr(rollout, "_workers", lambda *_, **__: contextlib.nullcontext({rollout.ENGINE: Liar()}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rollout.main(["--device", "cpu"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and "no speed is compared" in error and "1 of 10 responses differ" in error


def job(**changes: object) -> Job:
    sampling = SamplingParams(max_new_tokens=13, ignore_eos=True, remasking="static")
    model = ModelConfig(**SIZES["12m"], block_size=4)
    ways = {"static": sampling, "dynamic": dataclasses.replace(sampling, remasking="dynamic", threshold=0.3)}
    return Job(
        **dict(model=model, head_scale=1.0, prompts=2, samples=2, prompt_lengths=(3, 9), sampling=ways, seed=1)
        | changes
    )


def test_another_draw_is_noticed(monkeypatch) -> None:
    model = make_model(torch.float64)
    bench = Bench.__new__(Bench)  # its own model would need process groups of its own
    bench.job = dataclasses.replace(job(), model=dataclasses.replace(job().model, vocab_size=PAD_ID + 1))
    bench.model, bench.vocabulary, bench._copy = model, vocabulary(), None
    bench.shape = shape_of(model, PAD_ID + 1)
    options = EngineOptions(max_running_requests=4, max_length=bench.job.longest)
    assert bench.different([("engine", options)]) == []
    honest = rollout_worker.keyed_uniform
    monkeypatch.setattr(rollout_worker, "keyed_uniform", lambda stream: honest(stream + 1))
    complaints = bench.different([("engine", options)])
    assert [complaint.partition(":")[0] for complaint in complaints] == ["engine, static", "engine, dynamic"]


def test_the_small_case_keeps_what_is_compared() -> None:
    small = small_case(job())
    assert small.model.fp64 and not small.model.bf16 and small.model.block_size == 4
    assert small.sampling["dynamic"].threshold == 0.3 and small.longest == 32
    lengths = [small.prompt_length(n) for n in range(small.prompts)]
    assert min(lengths) >= 1 and max(lengths) <= 16 and len({length % 4 for length in lengths}) > 1


def test_a_part_of_the_prompts_is_as_long_as_all() -> None:
    lengths = [job(prompt_lengths=(64, 192)).prompt_length(n) for n in range(64)]
    assert min(lengths) < 70 and max(lengths) > 186
    for every in (2, 4, 8):
        assert sum(lengths[::every]) / len(lengths[::every]) == pytest.approx(sum(lengths) / 64, rel=0.1)


def made(seconds: float, tokens: int = 120, **changes: object) -> Generated:
    counts = dict(responses=4, blocks=30, prompt_tokens=400, prefilled=100, steps=60, forwards=60, passes=20)
    return Generated(**dict(seconds=seconds, cpu_seconds=seconds / 2, tokens=tokens, phases={}, **counts) | changes)


def test_ratios_are_of_medians_and_of_the_best_number_of_threads() -> None:
    options = EngineOptions(max_running_requests=2, max_length=64)
    line = lambda name, threads, options: rollout.Contestant(name, threads, 4, options)
    phases = {"schedule": 0.25, "model": 1.0, "sample": 0.5, "collect": 0.5}
    engines = [[made(s, phases=phases) for s in seconds] for seconds in ([2.0, 4.0, 3.0], [1.0, 1.0, 2.0])]
    result = summary(
        "static",
        {
            line("plain loop", 1, None): [made(10.0), made(12.0), made(11.0)],
            line("plain loop", 2, None): [made(20.0), made(20.0), made(20.0)],
            line("engine", 1, options): engines[0],
            line("engine", 2, options): engines[1],
            line("1 running", 2, dataclasses.replace(options, max_running_requests=1)): [made(30.0)] * 3,
        },
    )
    assert result["threads"] == {"engine": 2, "plain loop": 1}
    assert result["speed_up"]["best"] == pytest.approx([10.0, 12.0, 5.5])
    assert result["speed_up"]["1"] == pytest.approx([5.0, 3.0, 11 / 3])
    assert [one["ratio"] for one in result["contestants"]] == pytest.approx([1, 0.55, 11 / 3, 11.0, 11 / 30])
    text = report(result)
    assert "10.0 times as fast as the plain loop (5.5 to 12.0 in 3 rounds; threads: 2 and 1, best)" in text
    engine = next(row for row in text.splitlines() if row.startswith("engine"))
    assert engine.split() == [
        "engine",
        "1",
        "4",
        "40",
        "3.67",
        "80",
        *"20 2.00 2.00 2.00 100 400 1.00 0.50 0.75".split(),
    ]

    shape = Shape(2, 8, 16, 2, 1, 4, 32, 1e4, 1e-6, False)
    limits(result, job(), shape, "bf16", "CPU", None, None)
    assert "limit" not in report(result)
    limits(result, job(), shape, "bf16", "CPU", 1e6, 1e9)
    # 4 bytes of logits and 2 of each weight: 2 layers of 8 x (2 + 2 + 2) x 4 + 3 x 8 x 16, and a head of 32 x 8
    weights, cache = 2 * (2 * (8 * 6 * 4 + 3 * 8 * 16) + 32 * 8), 2 * 2 * 4 * 2
    seconds = (weights + 2 * (100 + 6.5) * cache + 4 * 2 * 32 * 4) / 1e6
    fast = result["contestants"][3]
    assert fast["limit"] == pytest.approx(2 * 4 / 3 / seconds)
    assert fast["share_of_limit"] == pytest.approx(120.0 / fast["limit"])
    assert "reached" in report(result)


@pytest.mark.parametrize(
    "sequences, context, milliseconds",
    [(1, 512, 3.17), (8, 512, 3.28), (32, 1024, 4.18), (64, 512, 4.96), (64, 1024, 5.96), (64, 2048, 7.98)],
)
def test_the_roofline_of_sdar_8b_on_an_h200(sequences: int, context: int, milliseconds: float) -> None:
    """Worked out by hand: 15.14 GB of matrices, 147,456 bytes of keys and values per token."""
    shape = Shape(36, 4096, 12288, 32, 8, 128, 151936, 1e6, 1e-6, False)
    assert matrix_parameters(shape) == pytest.approx(7.568e9, rel=1e-3)
    seconds = seconds_of_a_pass(shape, 2, HARDWARE["H200"], sequences, context, 4)
    assert 1000 * seconds == pytest.approx(milliseconds, abs=0.02)
    # 6.946e9 of the parameters are in layers: in FP8 of one byte, and multiplied at twice the rate
    products = 8 * sequences / 989e12
    waits = max(2 * 7.568e9 / 4.8e12, 7.568e9 * products), max(8.190e9 / 4.8e12, 4.095e9 * products)
    saved = seconds - seconds_of_a_pass(shape, 2, HARDWARE["H200"], sequences, context, 4, in_fp8=True)
    assert saved == pytest.approx(waits[0] - waits[1], rel=1e-3)
    assert tokens_per_second(seconds, sequences, 4, 2) == pytest.approx(4 / 3 * sequences / seconds)


def test_a_gpu_is_known_by_a_word_of_its_name() -> None:
    assert known("NVIDIA H100 80GB HBM3") is HARDWARE["H100"]
    assert known("NVIDIA A100-SXM4-80GB") is HARDWARE["A100"]
    assert known("NVIDIA H1000") is None and known("CPU") is None
    assert SimpleNamespace(**SIZES["8b"]).num_layers == 36
