#!/usr/bin/env python
"""One part of benchmarks/gpu_suite.py, in a process of its own: its figures stand in a file as soon as they are known.

python -m benchmarks.gpu_parts head --device cuda --size h200 --out head.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch

from benchmarks.gpu_figures import CUT_SHORT, PARTS, Sheet

MARGIN = 5.0  # seconds before the end of a part: programs that it calls are then ended, and what they wrote is read
LAST_ROUND = 0.5  # after which they begin no other round
ROOT = Path(__file__).resolve().parents[1]
_HAS_FP8 = (8, 9)  # compute capability of the oldest GPU that multiplies such numbers


def correctness(size, device: str, sheet: Sheet) -> None:
    checks = _json_of("gpu_check", f"{size.correctness} --device {device}", {0, 1}, sheet)
    failed = [check["what"] for check in checks if not check["passed"]]
    sheet.put("passed", len(checks) - len(failed))
    sheet.put("failed", len(failed), "; ".join(failed[:3]))


def packed(size, device: str, sheet: Sheet) -> None:
    (result,) = _json_of("tracerl_update", f"{size.packed} --device {device}{_rounds(sheet)}", {0}, sheet)["results"]
    sheet.put("packed", statistics.median(one["total"] for one in result["updates"]["packed"]))
    for layout, ratios in result.get("speed_up", {}).items():
        sheet.put(layout, statistics.median(ratios), f"{result['response_tokens']:,} response tokens")


def rollout(size, device: str, sheet: Sheet) -> None:
    arguments = f"{size.rollout} --device {device}"
    if not any(map(importlib.util.find_spec, ("flash_attn_interface", "flash_attn"))):
        why = "CUDA graphs need FlashAttention, which is not installed"
        sheet.miss(why, "graphs", "graphs limit", "fp8 graphs")
        arguments = arguments.replace("--cuda-graphs", "")
    if device == "cuda" and torch.cuda.get_device_capability() < _HAS_FP8:
        sheet.miss("this GPU multiplies no numbers of FP8", "fp8", "fp8 limit", "fp8 graphs")
        arguments = arguments.replace("--weights trained fp8", "")
    (result,) = _json_of("rollout", arguments + _rounds(sheet), {0}, sheet)["results"]
    lines = {one["name"]: one for one in result["contestants"]}
    names = {
        "tokens": "engine",
        "graphs": "CUDA graphs",
        "fp8": "weights fp8",
        "fp8 graphs": "weights fp8, CUDA graphs",
    }
    for key, name in names.items():
        if name in lines:
            share = f"{key} limit".replace("tokens ", "")
            sheet.put(key, lines[name]["tokens_per_second"], f"{lines[name]['responses']} responses")
            if "share_of_limit" in lines[name] and key != "fp8 graphs":
                sheet.put(share, 100 * lines[name]["share_of_limit"])
    sheet.put("plain", statistics.median(result["speed_up"]["best"]))


def training(name: str, size, device: str, sheet: Sheet) -> None:
    from benchmarks import gpu_training

    one = size.training[name]
    gpu_training.report(one.model, one.slices, one.traces, one.repeats, sheet, one.layers)


def step(size, device: str, sheet: Sheet) -> None:
    from benchmarks import gpu_step

    gpu_step.step(size.step, size.judged_words, size.step_repeats, sheet)


def curves(size, device: str, sheet: Sheet) -> None:
    from benchmarks import gpu_step

    gpu_step.curves(size.curves, size.curve_steps, sheet)


def head(size, device: str, sheet: Sheet) -> None:
    from benchmarks import loss_head
    from benchmarks.kernels import SAMPLERS, sampler_times
    from megatron_dlm.platform.kernels import missing

    one, name = size.head, "bf16" if device == "cuda" else "fp32"
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(loss_head.DTYPES[name])
    hidden, weight = draw(one.targets, one.hidden), draw(one.vocabulary, one.hidden).mul_(0.02)
    labels = torch.randint(1, one.vocabulary - 1, (one.targets,), generator=generator, device=device)
    for tensor in (hidden, weight):
        tensor.requires_grad_()

    def median(*how: object) -> tuple[float, float]:
        found = [loss_head.measure(hidden, weight, labels, *how) for _ in range(one.repeats + 1)][1:]
        return statistics.median(m.peak for m in found), statistics.median(m.forward + m.backward for m in found)

    base = median(0, False)
    lacking = missing()
    for key, how in (("chunk", (512, False)), ("triton", (512, False, True))):
        if key == "triton" and lacking:
            sheet.miss(lacking, "triton memory", "triton time", "sampler triton")
            continue
        try:
            memory, seconds = median(*how)
        except Exception as error:  # whatever a compiler says of this GPU
            sheet.miss(error, f"{key} memory", f"{key} time")
            continue
        sheet.put(f"{key} memory", memory / max(base[0], 1), f"of {base[0] / 2**20:,.0f} MiB")
        sheet.put(f"{key} time", seconds / max(base[1], 1e-9), f"of {1000 * base[1]:.1f} ms")
    for key in SAMPLERS[:1] if lacking else SAMPLERS:
        try:
            sizes = one.drawn, one.vocabulary, loss_head.DTYPES[name]
            seconds = sampler_times(*sizes, max(one.repeats, 3), samplers=(key,))[key]
        except Exception as error:
            sheet.miss(error, f"sampler {key}")
            continue
        sheet.put(f"sampler {key}", 1000 * seconds, f"{one.drawn:,} of {one.vocabulary:,}")


def attention(size, device: str, sheet: Sheet) -> None:
    from benchmarks.attention import figures

    for key, value in figures(size.attention, device).items():
        sheet.put(key, value)


def refit(size, device: str, sheet: Sheet) -> None:
    """Within this process; then between two with a GPU each, on a CPU over gloo."""
    from benchmarks.gpu_step import Moved, put_refit, refit_once
    from megatron_dlm.parallel import groups

    put_refit("copied", {0: refit_once(size.refit, 1, 5)}, sheet)
    groups.destroy()
    if device == "cuda" and torch.cuda.device_count() < 2:
        return sheet.miss("one GPU; it takes two", "moved", "moved seconds")
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        _run([*launcher, __file__, "refit rank", "--device", device, "--size", size.name, "--out", folder])
        put_refit(
            "moved", {int(file.stem): Moved(**json.loads(file.read_text())) for file in Path(folder).iterdir()}, sheet
        )


def _refit_rank(size, folder: Path) -> None:
    from dataclasses import asdict

    from benchmarks.gpu_step import refit_once
    from megatron_dlm.parallel import groups

    moved = refit_once(size.refit, 2, 3)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(asdict(moved)))
    groups.destroy()


RUN: Mapping[str, Callable[..., None]] = {
    "correctness": correctness,
    "packed": packed,
    "attention": attention,
    "rollout": rollout,
    "step": step,
    "head": head,
    "curves": curves,
    "refit": refit,
    **{name: partial(training, name.removeprefix("training-")) for name in PARTS if name.startswith("training-")},
}


def _rounds(sheet: Sheet) -> str:
    """The argument by which a program of rounds keeps within the time of a part."""
    return "" if sheet.seconds is None else f" --seconds {LAST_ROUND * sheet.seconds:.0f}"


def _json_of(program: str, arguments: str, good: set[int], sheet: Sheet) -> Any:
    """What another program of benchmarks/ writes with --json; what it has written by the end of the part's time.

    Raises:
        RuntimeError: it ended otherwise, or was ended before it wrote something; the message is the last line that it
            said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        try:
            done = _run(
                ["-m", f"benchmarks.{program}", *shlex.split(arguments), "--json", str(file)], good, sheet.left(MARGIN)
            )
        except subprocess.TimeoutExpired:
            sheet.cut = f"{program} was ended before it was through"
            if not file.exists():
                raise RuntimeError(f"{program} had not written anything when its time had gone") from None
        else:
            if not file.exists():
                raise RuntimeError(_last_line(done))
        return json.loads(file.read_text())


def _run(
    arguments: Sequence[str], good: set[int] = frozenset({0}), seconds: float | None = None
) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode not in good:
        raise RuntimeError(_last_line(done))
    return done


def _last_line(done: subprocess.CompletedProcess) -> str:
    said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()
    return f"{said[-1]} (exit code {done.returncode})"


def measure(part: str, size_name: str, device: str, out: Path, seconds: float | None = None) -> None:
    """Everything of a part; what goes wrong is written into its file, and raised.

    Args:
        seconds: that it has; None for as long as it takes.

    Raises:
        SystemExit: CUT_SHORT, because not all of it could be measured in this time.
    """
    from benchmarks.gpu_sizes import size_named

    sheet = Sheet(out, seconds)
    keys = [figure.key for figure in PARTS[part].figures]
    try:
        RUN[part](size_named(size_name), device, sheet)
        if sheet.wrong is not None:
            raise sheet.wrong
    except Exception as error:
        sheet.miss(error, *keys)
        if not sheet.cut:
            raise
    if sheet.cut:
        sheet.miss(sheet.cut, *keys)
        print(sheet.cut)
        sys.exit(CUT_SHORT)
    sheet.miss("this size has no such figure", *keys)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "refit rank"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("h200", "tiny"), default="h200")
    parser.add_argument("--deadline", type=float, help="when it is to have ended, in seconds since 1970; else never")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_dlm.commands.common import prepare_process

    prepare_process()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.part == "refit rank":
        from benchmarks.gpu_sizes import size_named

        return _refit_rank(size_named(options.size), options.out)
    with contextlib.redirect_stdout(sys.stderr):
        seconds = None if options.deadline is None else options.deadline - time.time()
        measure(options.part, options.size, options.device, options.out, seconds)


if __name__ == "__main__":
    main()
