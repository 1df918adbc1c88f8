#!/usr/bin/env python
"""What a GPU's compiler makes of our Triton kernels, on a host without one: registers, memory.

    python -m benchmarks.compiled [--capability 90] [--widths 151936 75968] [--blocks 4 16 64] [--json FILE]

The functions that launch kernels are called as they are, at the sizes that are named, over tensors on the CPU; Triton
is told that it has a GPU of this compute capability, compiles what it is asked for, and launches nothing. Exit code 1:
a kernel could not be launched there, because it takes more registers or shared memory than there are.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch

from benchmarks.common import table

DTYPES = (torch.bfloat16, torch.float32)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table 21)."""
REGISTERS = 65_536  # of a block's threads together


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as it was compiled."""

    name: str
    case: str
    warps: int
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread's own memory: what does not fit into registers, most of all."""
    shared: int
    """Bytes of a block."""
    ptx: str
    """What the assembler was given."""

    def fits(self, capability: int) -> bool:
        return self.registers * self.warps * 32 <= REGISTERS and self.shared <= SHARED[capability]


class Compiler:
    """A GPU as Triton's just-in-time compiler asks for one, for the rest of the process. It keeps what was compiled."""

    def __init__(self, capability: int) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        self.target, self.case = GPUTarget("cuda", capability, 32), ""
        self.found: dict[tuple[str, str], Kernel] = {}
        triton.runtime.driver.set_active(self)
        launch = JITFunction.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = launch(function, *args, grid=grid, warmup=True, **options)
            key = function.__name__, kernel.hash
            if key not in self.found:
                self.found[key] = _read(function.__name__, self.case, kernel)
            return kernel

        JITFunction.run = compile_only

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _read(name: str, case: str, kernel: Any) -> Kernel:
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        reader = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = {word: int(number) for word, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Kernel(
        name=name,
        case=case,
        warps=kernel.metadata.num_warps,
        registers=words["REG"],
        stack=words["STACK"] + words["LOCAL"],
        shared=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
    )


def head(width: int, dtype: torch.dtype) -> None:
    """The loss head, with entropies and without."""
    from megatron_dlm.model import head_triton
    from megatron_dlm.model.policy import Vocabulary

    logits, vocabulary = torch.empty(2, width, dtype=dtype), Vocabulary(width - 1, 7)
    labels, one = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for moment in (None, one):
        head_triton.statistics(logits, labels, 1.0, vocabulary, 0, moment is not None)
        head_triton.gradient_(logits, labels, one, one, one, moment, moment, vocabulary, 0)


def sampler(width: int, dtype: torch.dtype) -> None:
    """Draws, with top-k and top-p and without."""
    from megatron_dlm.diffusion.sampling import DrawRules
    from megatron_dlm.diffusion.sampling_triton import draw_logits

    whole, real = torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.float64)
    rules = DrawRules(whole.bool(), whole, real, real, whole)
    logits, slot = torch.empty(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    for filters in (False, True):
        draw_logits(logits, slot, slot, rules, whole, whole, width - 1, 7, filters)


def rounding(width: int, dtype: torch.dtype) -> None:
    """Activations to FP8."""
    from megatron_dlm.model.fp8_triton import quantise_rows

    quantise_rows(torch.empty(3, width, dtype=dtype))


def unmasking(block: int) -> None:
    """The choice of tokens that a denoising step unmasks."""
    from megatron_dlm.diffusion.sampling import Draws
    from megatron_dlm.rollout.batch import RunningBatch
    from megatron_dlm.rollout.unmask_triton import unmask

    texts = 3
    drawn = Draws(
        torch.zeros(texts * block, dtype=torch.int64), *(torch.zeros(texts * block).double() for _ in range(3))
    )
    tokens = torch.zeros(texts, block, dtype=torch.int64)
    batch = RunningBatch(8, 4096, 9, torch.device("cpu"))
    unmask(batch, drawn, torch.arange(texts), tokens, tokens.bool(), torch.zeros((), dtype=torch.int64))


def compiled(capability: int, widths: Sequence[int], sizes: Sequence[int], blocks: Sequence[int]) -> list[Kernel]:
    """Every kernel of ours, once for all cases that give the same code.

    Args:
        capability: of the GPU, 90 for 9.0. widths: columns of logits on a rank. sizes: of hidden states. blocks: their
            tokens.
    """
    compiler = Compiler(capability)

    def run(case: str, launch: Callable[..., None], *args: object) -> None:
        compiler.case = case
        launch(*args)

    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for width in widths:
            run(f"{width} {kind}", head, width, dtype)
            run(f"{width} {kind}", sampler, width, dtype)
        for size in sizes:
            run(f"{size} {kind}", rounding, size, dtype)
    for block in blocks:
        run(f"blocks of {block}", unmasking, block)
    return list(compiler.found.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, choices=SHARED, default=90, help="90 stands for 9.0")
    parser.add_argument("--widths", type=int, nargs="+", default=[151936, 75968, 18992], help="logits on a rank")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 12288], help="of hidden states, to FP8")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    found = compiled(options.capability, options.widths, options.sizes, options.blocks)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    header = ("kernel", "case", "warps", "registers", "stack", "shared")
    columns = operator.attrgetter("name", *header[1:])
    print(table(header, [[str(value) for value in columns(one)] for one in found]))
    lost = [f"{one.name}, {one.case}" for one in found if not one.fits(options.capability)]
    print(f"{len(found)} kernels. " + (f"Cannot be launched: {'; '.join(lost)}." if lost else "All can be launched."))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
