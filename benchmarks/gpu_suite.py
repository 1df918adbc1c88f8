#!/usr/bin/env python
"""All checks and all figures of a GPU: correctness first, then speed, within a budget of time.

    python -m benchmarks.gpu_suite --json gpu.json                              # as much as fits into 10 minutes
    python -m benchmarks.gpu_suite --json gpu.json --write docs/performance.md  # and renew the table there
    python -m benchmarks.gpu_suite --parts training-8b rollout --keep --json gpu.json
    python -m benchmarks.gpu_suite --parts --write docs/performance.md          # nothing is run: what there would be
    python -m benchmarks.gpu_suite --device cpu --size tiny                     # shows that it works

Each part (benchmarks/gpu_figures.py) is a process of its own, and what it has found stands in a file at once; so a part
that crashes or hangs costs nothing but its own missing figures, and the JSON file is written after each. A part ends
when its share of what is left of --budget has gone, with the figures that it has; what one does not use is for those
behind it, and the last lines name those that were cut short. What a part needs on a GPU has not been measured. Each
part's record says which run it is from: the device, versions, revision, date and command. --keep takes records of the
same device and size only.

Exit code 0: all ran and all checks of correctness passed. 1: not so. 2: the command line cannot work.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from benchmarks.gpu_figures import COMMAND, CUT_SHORT, PARTS, limit_of
from benchmarks.gpu_report import MARKER, markdown_of, summary

OUT_OF_TIME = "its time had gone"  # why a part was ended, or has ended itself
GRACE = 5.0  # seconds that torchrun has to end its workers
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "flash-attn", "megatron-dlm")
Start = Callable[[str, argparse.Namespace, Path, float], str | None]


def main(argv: Sequence[str] | None = None, start: Start | None = None) -> int:
    """Args: start: runs a part, and returns why it did not end well, if so; for tests."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if (mistake := _mistake(options)) is not None:
        print(mistake, file=sys.stderr)
        return 2
    result = {"parts": _kept(options)}
    this_run = about(options, argv)
    deadline, late = time.monotonic() + options.budget, []
    if options.device == "cuda":
        _import_once()
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in PARTS if name in options.parts]:
            limit = limit_of(name, options.parts, deadline - time.monotonic())
            one = _measure(name, options, Path(folder), limit, start or as_process)
            known = any("value" in figure for figure in one["figures"].values())
            if known or not one["late"] or name not in result["parts"]:  # no time is no reason to forget what is kept
                result["parts"][name] = one | {"about": this_run}
            late += [name] * one["late"]
            _write(options, result)
            print(f"{name}: {one['why'] or 'done'} ({one['seconds']:.0f} s)", flush=True)
    _write(options, result)
    print("\n" + summary(result))
    if late:
        where = ["--device", options.device, "--size", options.size] if options.size == "tiny" else []
        keep = ["--json", options.json, "--keep"] if options.json else []
        again = shlex.join([*late, *where, *keep])
        count = "1 part was" if len(late) == 1 else f"{len(late)} parts were"
        print(f"For want of time {count} left out or cut short: {COMMAND} --parts {again}")
    return 1 if late or any(one["why"] for one in result["parts"].values()) or not _correct(result) else 0


def _import_once() -> None:
    """Try out whether Transformer Engine can be imported, for all parts and what they start: each would else try it."""
    from megatron_dlm.platform import te  # touches no GPU

    te.found()


def _measure(name: str, options: argparse.Namespace, folder: Path, limit: float, start: Start) -> dict[str, Any]:
    """The record of a part, but for the run that it is of."""
    out, began = folder / f"{name}.json", time.monotonic()
    if limit < 1:
        why = f"no time was left of --budget {options.budget}"
    else:
        why = start(name, options, out, limit)
    figures, seconds = json.loads(out.read_text()) if out.exists() else {}, time.monotonic() - began
    cut_short = why == OUT_OF_TIME
    if cut_short:
        why = f"cut short after {seconds:.0f} seconds, its share of --budget {options.budget}"
    return {"figures": figures, "why": why, "seconds": seconds, "late": limit < 1 or cut_short}


def as_process(name: str, options: argparse.Namespace, out: Path, limit: float) -> str | None:
    """Run a part to its end or to its limit; it and all that it started are then gone."""
    where = ["--device", options.device, "--size", options.size, "--deadline", f"{time.time() + limit:.1f}"]
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, *where]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, "--out", str(out)], cwd=ROOT, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        said.seek(0)
        lines = said.read().strip().splitlines()
    if code == 0:
        return None
    if code in (None, CUT_SHORT):
        return OUT_OF_TIME
    if options.verbose:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return f"{lines[-1][:200] if lines else 'it said nothing'} (exit code {code})"


def _end(process: subprocess.Popen) -> None:
    """End a part and what it has started; torchrun is asked first, for its workers have sessions of their own, and has
    some seconds to end them, also where the part itself has ended before it.
    """
    with contextlib.suppress(ProcessLookupError):  # as soon as none of them is left
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(round(GRACE / 0.05)):
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def about(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": _device(options.device),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"{COMMAND} {shlex.join(argv)}".strip(),
        "revision": _said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "size": options.size,
    }


def _kept(options: argparse.Namespace) -> dict[str, Any]:
    """The parts of a former run that this one goes on from."""
    return json.loads(Path(options.json).read_text())["parts"] if options.keep else {}


def _device(kind: str) -> str:
    """Asked for by nvidia-smi: this process must not hold memory of a GPU that the parts need."""
    if kind == "cpu":
        return f"CPU ({platform.machine()})"
    names = _said_by("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return f"{len(names)} x {names[0]}" if names else ""


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _correct(result: Mapping[str, Any]) -> bool:
    """Whether no check of correctness failed, where they were made."""
    failed = result["parts"].get("correctness", {}).get("figures", {}).get("failed", {"value": 0})
    return failed.get("value", 0) == 0


def _write(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if options.json:
        path = Path(options.json)
        scratch = path.with_name(path.name + ".new")
        scratch.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(scratch, path)
    if options.write:
        from benchmarks.scaling import between_markers

        page = Path(options.write)
        page.write_text(between_markers(page.read_text(), MARKER, markdown_of(result)))


def _mistake(options: argparse.Namespace) -> str | None:
    """Why the command line cannot work."""
    if options.device == "cuda" and options.parts and not _device("cuda"):
        return "gpu_suite needs a GPU, and there is none; --device cpu --size tiny shows that it works."
    if options.device == "cpu" and options.size != "tiny" and options.parts:
        return f"--size {options.size} is for GPUs. Use --size tiny on a CPU."
    if options.write and options.size == "tiny" and options.parts and not options.write_toys:
        return "--write is for figures that mean something; those of --size tiny do not. Leave it out, or --write-toys."
    page = Path(options.write).read_text() if options.write and Path(options.write).is_file() else ""
    if options.write and not all(f"<!-- {marker} -->" in page for marker in (MARKER, f"end of {MARKER}")):
        return (
            f"--write {options.write} is not a file with <!-- {MARKER} --> and <!-- end of {MARKER} --> in it. Give "
            "docs/performance.md."
        )
    if options.json and (Path(options.json).is_dir() or not Path(options.json).resolve().parent.is_dir()):
        return f"--json {options.json} cannot be written. Give a file in a folder that exists."
    if options.keep and not (options.json and Path(options.json).is_file()):
        return "--keep goes on from the file of --json, which is not there. Leave it out."
    if options.budget < 1:
        return f"--budget {options.budget} leaves no time. Give seconds."
    return _mistake_in_kept(options)


def _mistake_in_kept(options: argparse.Namespace) -> str | None:
    """Why figures of a former run cannot stand beside this one's, or in a page."""
    device = _device(options.device) if options.keep and options.parts else ""
    try:
        kept = {name: one["about"] for name, one in _kept(options).items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"--keep cannot go on from {options.json}, which this program has not written. Leave it out."
    for name, other in kept.items():
        if options.parts and (other["device"], other["size"]) != (device, options.size):
            return (
                f"--keep would put figures of {device}, size {options.size}, beside those of {other['device']}, size "
                f"{other['size']}, which {options.json} has of {name}. Give another file."
            )
        if options.write and other["size"] == "tiny" and not options.write_toys:
            return f"--write is for figures that mean something; those of {options.json} are of --size tiny."
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="All checks and figures of a GPU.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="without any, nothing is run")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--size", choices=("h200", "tiny"), default="h200", help="tiny: toy sizes that show that everything works")
    add("--budget", type=int, metavar="SECONDS", default=600, help="for all parts together")
    add("--json", metavar="FILE", help="write all figures there, after each part")
    add("--keep", action="store_true", help="parts that are not run keep the figures that --json has of them")
    add("--write", metavar="FILE", help="renew the table between the comments in this Markdown file")
    add("--write-toys", action="store_true", help="even with figures of toy sizes")
    add("--verbose", action="store_true", help="show what a part that fails has said")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at work ends too
    sys.exit(main())
