"""Memory and time of conversion between HuggingFace and distributed checkpoints, for a model of random weights.

    python -m benchmarks.convert --workspace /tmp/convert [--processes 1 2] [--layers 16 --hidden-size 2048 ...]

For each number of processes it converts in and out again and prints, per direction: the largest peak of anonymous
memory among the processes (above what was in use when the work began; mapped files do not count), the share of a
process, the largest tensor, and seconds per gigabyte. The bound is 1.3 x share + largest tensor; exit code 1 if it is
passed, or if what comes out differs from what went in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_dlm.checkpoint.hf.families import FAMILIES
from megatron_dlm.checkpoint.hf.safetensors_folder import INDEX, SafetensorsFolder, SafetensorsWriter
from megatron_dlm.checkpoint.hf.spans import tensors_of
from megatron_dlm.checkpoint.hf.stored import whole_model
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve

BOUND = 1.3


def write_model(folder: Path, model: ModelConfig, files: int) -> tuple[int, int]:
    """An SDAR checkpoint of random bf16 weights, written tensor by tensor; returns its bytes and its largest tensor."""
    family = FAMILIES["sdar"]
    shapes = {name: shape for name, (shape, _) in tensors_of(family.table, whole_model(model), model).items()}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    sizes, places = {}, {}
    for index in range(files):
        names = list(shapes)[index::files]
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        with SafetensorsWriter(folder / file, [(name, torch.bfloat16, shapes[name]) for name in names]) as writer:
            for name in names:
                tensor = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(generator=generator)
                writer.write(name, tensor)
                sizes[name], places[name] = tensor.nbytes, file
    config = family.write(model) | {"architectures": [family.architecture], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(sizes.values()), max(sizes.values())


def work(direction: str, source: str, target: str) -> None:
    """One direction in this process of a job; prints its peak."""
    from benchmarks.memory import Peak
    from megatron_dlm.commands import convert
    from megatron_dlm.commands.common import prepare_process, running
    from megatron_dlm.config.convert import ExportConfig, ImportConfig

    prepare_process()
    with running():
        from megatron_dlm.config.parallel import ParallelConfig
        from megatron_dlm.parallel.groups import initialize

        initialize(ParallelConfig(), seed=0)
        import megatron_dlm.checkpoint.distributed
        import megatron_dlm.checkpoint.hf.exporter
        import megatron_dlm.checkpoint.hf.importer  # noqa: F401 (libraries are no part of the work)

        began = time.perf_counter()
        with Peak() as peak:
            if direction == "in":
                convert.import_hf(ImportConfig(hf_checkpoint=source, save=target))
            else:
                convert.export_hf(ExportConfig(load=source, save=target, max_shard_gb=0.5))
        seconds = time.perf_counter() - began
    print(json.dumps({"peak": peak.bytes, "seconds": seconds}), flush=True)


def launch(processes: int, *words: str) -> list[dict]:
    """Run `work` in a job of so many processes; returns what each printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.convert", "--work", *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"peak"')]


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    first, second = SafetensorsFolder(one), SafetensorsFolder(other)
    if first.tensors.keys() != second.tensors.keys():
        return False
    rows = {name: info.shape[0] for name, info in first.tensors.items()}
    return all(torch.equal(first.read(name, 0, count), second.read(name, 0, count)) for name, count in rows.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, help="folder for the checkpoints; three times their size is needed")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    for name, value in dict(layers=16, hidden_size=2048, ffn_hidden_size=6144, heads=16, groups=8, vocab=65536).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(*args.work)
        return 0
    if args.workspace is None:
        parser.error("--workspace is not set")
    model = resolve(
        ModelConfig(
            num_layers=args.layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.heads,
            num_query_groups=args.groups,
            kv_channels=128,
            vocab_size=args.vocab,
            block_size=4,
        ),
        None,
    )
    shutil.rmtree(args.workspace, ignore_errors=True)
    total, largest = write_model(args.workspace / "hf", model, files=3)
    print(f"{total / 2e9:.2f}B parameters, {total / 1e9:.2f} GB in bf16; largest tensor {largest / 1e6:.0f} MB")
    print(f"{'':10} {'processes':>9} {'share, MB':>10} {'peak, MB':>9} {'bound, MB':>10} {'s':>6} {'s/GB':>6}")
    good = True
    for processes in args.processes:
        shutil.rmtree(args.workspace / "megatron", ignore_errors=True)
        shutil.rmtree(args.workspace / "back", ignore_errors=True)
        share = total / processes
        for direction, source, target in (("in", "hf", "megatron"), ("out", "megatron", "back")):
            found = launch(processes, direction, str(args.workspace / source), str(args.workspace / target))
            peak, seconds = max(one["peak"] for one in found), max(one["seconds"] for one in found)
            bound = BOUND * share + largest
            good &= peak <= bound
            name = "import" if direction == "in" else "export"
            print(
                f"{name:10} {processes:9d} {share / 1e6:10.0f} {peak / 1e6:9.0f} {bound / 1e6:10.0f} {seconds:6.1f} "
                f"{seconds / total * 1e9:6.1f}{'' if peak <= bound else '  OVER'}"
            )
        equal = same(args.workspace / "hf", args.workspace / "back")
        good &= equal
        print(f"what came out is {'equal' if equal else 'NOT equal'} to what went in, bit by bit")
    shutil.rmtree(args.workspace)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
