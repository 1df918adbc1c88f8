"""Memory and time of the loss head: in chunks (model/head.py) against the table of all logits.

    python -m benchmarks.loss_head [--targets 2048 8192] [--vocab-size 37984] [--hidden-size 4096] [--dtypes bf16 fp32]
                                   [--chunk-sizes 0 128 512 2048] [--heads torch triton] [--with-entropy]
                                   [--memory-gb 8] [--threads 1]

One forward and backward pass of the sum of the labels' log-probabilities, from hidden states and a weight of random
numbers; `--vocab-size` is that of one rank's shard (151936 / TP for the models with 8 billion parameters). Chunk size 0
is the table. `--heads`: who works on a chunk's logits (--loss-head of the commands); both on a GPU that has
triton, else torch. Peak memory is what the passes add to hidden states and weight: their gradients, and all that is in
between. On CUDA it is the allocator's and the time is that of the clock; on the CPU it is resident memory, and the time
is that of the processor, since others may use it too. A table that would take more than `--memory-gb` is left
out. Exit code 1 if log-probabilities or gradients differ by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.memory import HighWater
from megatron_dlm import platform
from megatron_dlm.model.head import label_policy
from megatron_dlm.model.policy import Vocabulary, by_chunks, entropy, label_logprobs, policy_scores
from megatron_dlm.platform.kernels import by_triton

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TABLES = 3  # of fp32, N x V elements, that the table's loss has at its peak, besides logits and gradients
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # of each result, relative in norm
TEMPERATURE = 0.9


@dataclass(frozen=True, slots=True)
class Measured:
    """Peak bytes and seconds of one way; `results` are the log-probabilities, the gradient of the hidden states, and
    that of the weight times a fixed vector.
    """

    peak: int
    forward: float
    backward: float
    results: tuple[Tensor, ...]


def measure(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, with_entropy: bool, fused: bool = False
) -> Measured:
    """One forward and one backward pass. `fused`: chunks by Triton's kernels."""
    vocabulary = Vocabulary(len(weight) - 1, 0)
    clock = time.perf_counter if platform.is_cuda() else time.process_time

    def now() -> float:
        platform.synchronize()
        return clock()

    hidden.grad = weight.grad = None
    with HighWater() as peak:
        start = now()
        if chunk_size:
            logprob, entropies = label_policy(
                hidden, weight, labels, TEMPERATURE, vocabulary, None, chunk_size, with_entropy, fused
            )
        else:
            scores = policy_scores(torch.nn.functional.linear(hidden, weight), TEMPERATURE, vocabulary)
            logprob = label_logprobs(scores, labels)
            entropies = by_chunks(entropy, scores) if with_entropy else None
            del scores
        middle = now()
        loss = logprob.sum() if entropies is None else (logprob - 0.1 * entropies).sum()
        loss.backward()
        end = now()
    along = torch.linspace(-1, 1, hidden.shape[1], device=hidden.device).to(weight.dtype)
    results = logprob.detach(), hidden.grad, weight.grad @ along
    hidden.grad = weight.grad = None
    return Measured(peak.bytes, middle - start, end - middle, results)


def table_bytes(targets: int, width: int, hidden_size: int, itemsize: int) -> int:
    """What the table's loss needs at least."""
    return targets * width * (4 * TABLES + itemsize) + (width + targets) * hidden_size * itemsize


def compare(args: argparse.Namespace, name: str, targets: int) -> bool:
    """Print one block of lines; whether all ways gave the same."""
    device, dtype = platform.device(), DTYPES[name]
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)
    hidden, weight = draw(targets, args.hidden_size), draw(args.vocab_size, args.hidden_size).mul_(0.02)
    labels = torch.randint(1, args.vocab_size - 1, (targets,), generator=generator, device=device)
    for tensor in (hidden, weight):
        tensor.requires_grad_()
    base: Measured | None = None
    equal = True
    ways = [(size, head) for size in args.chunk_sizes for head in (args.heads if size else ["torch"])]
    for chunk_size, head in ways:
        way = f"chunk {chunk_size}" + " triton" * (head == "triton") if chunk_size else "table"
        label = f"{name}  N {targets:6}  {way:>18}"
        needed = table_bytes(targets, args.vocab_size, args.hidden_size, hidden.element_size())
        if not chunk_size and needed > args.memory_gb * 1e9:
            print(f"{label}  left out: {needed / 1e9:.1f} GB", flush=True)
            continue
        found = measure(hidden, weight, labels, chunk_size, args.with_entropy, head == "triton")
        seconds, ratios = found.forward + found.backward, ""
        if base is None:
            base, of = found, "table" if not chunk_size else f"chunk {chunk_size}"
        else:
            part = found.peak / max(base.peak, 1), seconds / max(base.forward + base.backward, 1e-9)
            ratios = f"  memory x {part[0]:.2f}, time x {part[1]:.2f} of {of}"
            pairs = zip(found.results, base.results)
            equal &= all((one.float() - other.float()).norm() < TOLERANCE[name] * other.norm() for one, other in pairs)
        times = f"{found.forward:6.2f} + {found.backward:6.2f} s"
        print(f"{label}  {found.peak / 1e6:8.0f} MB  {times}{ratios}", flush=True)
    return equal


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab-size", type=int, default=37984, help="tokens of one rank's shard")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[0, 128, 512, 2048], help="0 is the table")
    parser.add_argument("--with-entropy", action="store_true", help="the loss has the policy's entropy, too")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="leave tables out that take more than this")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    both = ["torch", "triton"] if by_triton("--heads", "auto") else ["torch"]
    parser.add_argument("--heads", nargs="+", choices=["torch", "triton"], default=both, help="who works on a chunk")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(
        f"{platform.device()}, hidden size {args.hidden_size}, {args.vocab_size} tokens of vocabulary"
        f"{', with entropy' if args.with_entropy else ''}; peak memory; seconds of forward + backward",
        flush=True,
    )
    results = [compare(args, name, targets) for name in args.dtypes for targets in args.targets]
    if not all(results):
        print("the ways differ by more than rounding", file=sys.stderr)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
