"""Attention of a packed row, forward and backward: FlexAttention, torch's dense attention by group, and over the whole
row under one mask.

    python -m benchmarks.attention --device cuda              # a prompt of 512, a response of 4096, block 4, bf16
    python -m benchmarks.attention --prompt 64 --response 256 --heads 4 --kv-heads 2 --width 16 --dtype fp32    # a CPU
    ... [--views 3] [--samples 4] [--repeats 10] [--backends flex dense whole] [--threads 1] [--json FILE]

The row is the prompt, the finished response, and `--views` noisy copies of each of its blocks, for each of `--samples`
responses. One head's FLOPs are those of the pairs of a query and a key that are visible, 4 x width forward and 2.5
times that backward, whatever a backend computes besides. "mask" is what is made once per row from its layout. Times are
medians after a warm-up. On a CPU FlexAttention's mask is written out, so its figures say nothing about the kernel.

"graphs" is what torch compiled for FlexAttention, over the row and a shorter one: one graph, if lengths and layouts
change without compiling again. Exit code 1 if outputs or gradients differ by more than rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch
from torch import Tensor

from benchmarks.common import median_seconds, table
from benchmarks.memory import Peak
from megatron_dlm import platform
from megatron_dlm.diffusion.layout import CLEAN, PROMPT, Layout, visible
from megatron_dlm.model.attention import DenseAttention, masked_attention
from megatron_dlm.model.attention_flex import FlexAttention
from megatron_dlm.planning.work import ATTENTION_BACKWARD

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = {"bf16": 3e-2, "fp32": 1e-4, "fp64": 1e-10}  # of output and gradients, relative in norm
COLUMNS = "backend tokens mask,ms forward,ms backward,ms TFLOP/s,fwd bwd MiB differs graphs".split()


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a row (in tokens) and of its heads."""

    prompt: int = 512
    response: int = 4096
    block: int = 4
    views: int = 1
    samples: int = 1
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    dtype: str = "bf16"


@dataclass(frozen=True, slots=True)
class Figure:
    """What one backend did. Seconds; TFLOP/s of visible pairs; bytes.

    Attributes:
        difference: the largest difference of output and gradients from the last backend's, relative in norm.
        graphs: that torch compiled. error: why there is nothing else; None otherwise.
    """

    backend: str
    tokens: int
    pairs: int
    mask_s: float = float("nan")
    forward_s: float = float("nan")
    backward_s: float = float("nan")
    forward_tflops: float = float("nan")
    backward_tflops: float = float("nan")
    peak_bytes: int = 0
    difference: float = 0.0
    graphs: int = 0
    error: str | None = None


class WholeAttention:
    """Attention of all tokens of a row to all under one [T, T] mask."""

    def __init__(self, layout: Layout) -> None:
        self.mask = visible(layout, layout)[None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return masked_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), self.mask, scale).transpose(0, 1)


BACKENDS = {"flex": FlexAttention, "dense": DenseAttention, "whole": WholeAttention}


def row_layout(case: Case) -> Layout:
    """The layout of one group, on the host. Prompt and response are whole blocks."""
    at = torch.arange(case.prompt, case.prompt + case.response)
    prompt = torch.arange(case.prompt)
    parts = [(prompt, torch.full_like(prompt, PROMPT), torch.full_like(prompt, CLEAN))]
    for sample in range(case.samples):
        whose = torch.full_like(at, sample)
        parts.append((at, whose, torch.full_like(at, CLEAN)))
        # Block by block, all copies of a block before those of the next, as rows of traces are laid out
        blocks = at.view(-1, 1, case.block).expand(-1, case.views, -1)
        number = 1 + torch.arange(blocks.shape[0] * case.views).repeat_interleave(case.block)
        noisy = blocks.reshape(-1)
        parts.append((noisy, torch.full_like(noisy, sample), number))
    position, response, view = (torch.cat(column).int() for column in zip(*parts))
    return Layout(torch.zeros_like(position), response, view, position // case.block, position)


def visible_pairs(layout: Layout) -> int:
    """Pairs of a query and a key, counted a piece of the mask at a time."""
    names = [field.name for field in dataclasses.fields(Layout)]
    pieces = zip(*(getattr(layout, name).split(1024) for name in names))
    return sum(int(visible(Layout(*piece), layout).sum()) for piece in pieces)


def measure(case: Case, repeats: int = 10, backends: Sequence[str] = tuple(BACKENDS)) -> list[Figure]:
    """Figures of each backend on this process's device; one that fails says why."""
    host = row_layout(case)
    layout, pairs = host.to(platform.device()), visible_pairs(host)
    draw = _draws(case.dtype, 0)
    tokens = len(host.group)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    inputs = [draw(tokens, 1, count, case.width).requires_grad_() for count in heads]
    gradient = draw(tokens, 1, case.heads * case.width)
    figures: list[Figure] = []
    expected: list[Tensor] | None = None
    for name in reversed(backends):
        try:
            figure, results = _measured(name, case, layout, pairs, inputs, gradient, repeats)
        except Exception as error:  # out of memory, or no kernel that this GPU can run: the others are worth having
            said = str(error).partition("\n")[0][:200]
            figures.append(Figure(name, tokens, pairs, error=f"{type(error).__name__}: {said}"))
            continue
        expected = expected or results
        difference = max(_relative(one, other) for one, other in zip(results, expected))
        figures.append(dataclasses.replace(figure, difference=difference))
    return figures[::-1]


def _measured(
    name: str, case: Case, layout: Layout, pairs: int, inputs: list[Tensor], gradient: Tensor, repeats: int
) -> tuple[Figure, list[Tensor]]:
    kind, scale = BACKENDS[name], case.width**-0.5
    graphs = _graphs()
    mask_s, attention = median_seconds(lambda: kind(layout), repeats)
    forward_s, out = median_seconds(lambda: attention(1, *inputs, scale), repeats)
    results, out = [out.detach()], None
    # A pass of its own for each: what was compiled may write its gradients where it has read, and goes back only once.
    backward_s, gradients = median_seconds(
        lambda out: torch.autograd.grad(out, inputs, gradient), repeats, lambda: attention(1, *inputs, scale)
    )
    results, gradients = [*results, *gradients], None
    with Peak() as peak:
        torch.autograd.grad(attention(1, *inputs, scale), inputs, gradient)
    if name == "flex":  # once more with another layout and length
        shorter = row_layout(dataclasses.replace(case, response=case.response // 2 // case.block * case.block))
        count = len(shorter.group)
        again = kind(shorter.to(layout.group.device))(1, *(x[:count] for x in inputs), scale)
        torch.autograd.grad(again, inputs, gradient[:count])
    flops = 4 * case.heads * case.width * pairs / 1e12
    return Figure(
        name,
        len(layout.group),
        pairs,
        mask_s,
        forward_s,
        backward_s,
        flops / forward_s,
        ATTENTION_BACKWARD * flops / backward_s,
        peak.bytes,
        graphs=_graphs() - graphs,
    ), results


def differences(dtype: torch.dtype) -> dict[str, float]:
    """FlexAttention on this process's device against dense attention in float64 on the CPU: the relative difference in
    norm of the output and of the gradients, for some layouts. Nothing where it does not compute in this dtype.
    """
    device, found = platform.device(), {}
    if device.type == "cuda" and dtype == torch.float64:
        return found
    cases = {
        "one response": Case(96, 256, 4, heads=4, kv_heads=2, width=64),
        "many copies": Case(32, 128, 8, views=3, samples=2, heads=4, kv_heads=1, width=64),
        "token by token": Case(64, 192, 1, heads=2, kv_heads=2, width=128),
    }
    name_of = {value: key for key, value in DTYPES.items()}
    for name, case in cases.items():
        layout, draw = row_layout(case), _draws(name_of[dtype], 1)
        tokens = len(layout.group)
        heads = (case.heads, case.kv_heads, case.kv_heads)
        drawn = [draw(tokens, 1, count, case.width) for count in heads] + [draw(tokens, 1, case.heads * case.width)]
        results = []
        for kind, where, wide in ((FlexAttention, device, dtype), (DenseAttention, torch.device("cpu"), torch.float64)):
            *inputs, gradient = (x.detach().to(where, wide) for x in drawn)
            inputs = [x.requires_grad_() for x in inputs]
            out = kind(layout.to(where))(1, *inputs, case.width**-0.5)
            gradients = torch.autograd.grad(out, inputs, gradient)
            results.append([x.detach().cpu().double() for x in (out, *gradients)])
        output, *rest = (_relative(one, other) for one, other in zip(*results))
        found[f"attention of training, output, {name}"] = output
        found[f"attention of training, gradients, {name}"] = max(rest)
    return found


def figures(arguments: str = "", device: str = "cuda") -> dict[str, float]:
    """What benchmarks/gpu_suite.py shows.

    Args:
        arguments: of this program. device: what is meant; where it is not this process's, nothing is measured.

    Returns: TFLOP/s forward and backward, how much faster FlexAttention is than the two dense ways, and milliseconds
        for its mask.

    Raises:
        RuntimeError: no FlexAttention, or it computes something else.
    """
    options = _parser().parse_args(shlex.split(arguments))
    if platform.device().type != device:
        raise RuntimeError(f"this process runs on {platform.device().type}, not on {device}")
    found = {figure.backend: figure for figure in measure(_case(options), options.repeats)}
    flex = found["flex"]
    if flex.error or flex.difference > TOLERANCE[options.dtype]:
        raise RuntimeError(flex.error or f"FlexAttention differs by {flex.difference:.1e}")
    both = {name: figure.forward_s + figure.backward_s for name, figure in found.items() if figure.error is None}
    values = {"forward": flex.forward_tflops, "backward": flex.backward_tflops, "mask": 1000 * flex.mask_s}
    for key, name in (("gain", "whole"), ("gain by group", "dense")):
        if name in both:
            values[key] = both[name] / both["flex"]
    return values


def _draws(dtype: str, seed: int) -> Callable[..., Tensor]:
    """Random numbers of this process's device, drawn on the host."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DTYPES[dtype]).to(platform.device())


def _relative(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def _graphs() -> int:
    """That torch has compiled in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")  # which takes long to import, and is there once it was needed
    return compiler.counters["stats"]["unique_graphs"] if compiler else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for field in dataclasses.fields(Case):
        if field.name != "dtype":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="refuse to run on another")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    return parser


def _case(options: argparse.Namespace) -> Case:
    return Case(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Case)})


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    case, device = _case(options), platform.device()
    if options.device not in (None, device.type):
        print(f"--device {options.device}: this process would run on {device.type}.", file=sys.stderr)
        return 2
    if case.prompt % case.block or case.response % case.block:
        print(f"--prompt and --response must be multiples of --block {case.block}.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    found = measure(case, options.repeats, options.backends)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {case}; {found[0].pairs:,} visible pairs\n")
    print(table([name.replace(",", " ") for name in COLUMNS], [_line(figure) for figure in found]))
    for figure in found:
        if figure.error:
            print(f"{figure.backend} was not measured: {figure.error}")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(figure) for figure in found], indent=1))
    wrong = [figure.backend for figure in found if figure.difference > TOLERANCE[case.dtype]]
    if wrong:
        print(f"{' and '.join(wrong)} differ by more than rounding", file=sys.stderr)
    return 1 if wrong or all(figure.error for figure in found) else 0


def _line(figure: Figure) -> list[str]:
    milliseconds = [f"{1000 * value:.2f}" for value in (figure.mask_s, figure.forward_s, figure.backward_s)]
    flops = [f"{value:.3g}" for value in (figure.forward_tflops, figure.backward_tflops)]
    rest = [f"{figure.peak_bytes / 2**20:.0f}", f"{figure.difference:.1e}", str(figure.graphs)]
    return [figure.backend, str(figure.tokens), *milliseconds, *flops, *rest]


if __name__ == "__main__":
    sys.exit(main())
