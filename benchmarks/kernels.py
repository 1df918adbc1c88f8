"""The Triton kernels of the loss head and of the sampler: do they compute what torch does, and the sampler's time.

    python -m benchmarks.kernels [--rows 1024] [--vocab-size 151936] [--repeats 20]

The loss head's memory and time are benchmarks/loss_head.py's. On a host without a GPU the kernels run in triton's
interpreter (set TRITON_INTERPRET=1), which shows what they compute, and nothing about their time. Exit code 1: a
difference is larger than its dtype explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common import median_seconds, table
from megatron_dlm import platform
from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.sampling import Asked, Confidence, DrawRules, draw
from megatron_dlm.model.head import label_policy
from megatron_dlm.model.policy import Vocabulary, policy_scores
from megatron_dlm.platform import kernels

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SAMPLERS = ("torch", "triton")
_SMALL = 9001  # tokens of a vocabulary that the kernels take in several pieces
OTHER_TOKENS = 0.02  # share of draws that may fall on the other side of a boundary


def differences(dtype: torch.dtype, columns: int = _SMALL, rows: int = 96) -> dict[str, float]:
    """What the kernels give on `platform.device()`, relative in norm to float64 on the same logits or weights.

    Args:
        dtype: of hidden states, weight and logits: float32 or bfloat16. columns: of the logits. rows: that are drawn,
            a quarter as many pass the head.

    Returns:
        by name; 'draws that differ' is a share, the rest is to stay below TOLERANCES[dtype].
    """
    found = {}
    hidden, weight, labels = _head_inputs(rows // 4, columns, 64, dtype)
    vocabulary = Vocabulary(columns - 5, 7)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    results = []
    for leaves, fused in (((hidden, weight), True), (exact, False)):
        logprob, entropies = label_policy(*leaves, labels, 0.9, vocabulary, None, 16, True, fused)
        gradients = torch.autograd.grad(logprob.sum() + 0.1 * entropies.sum(), leaves)
        results.append([one.detach().double() for one in (logprob, entropies, *gradients)])
    names = ("log-probabilities", "entropies", "gradient of hidden states", "gradient of the weight")
    for name, mine, right in zip(names, *results):
        found[f"loss head, {name}"] = float((mine - right).norm() / right.norm())
    logits, rules, streams, steps, slot = _draw_inputs(rows, columns, dtype, filters=True)
    drawn = _by_kernels(logits, rules, streams, steps, slot, vocabulary)
    wanted = _by_torch(logits.double(), rules, streams, steps, slot, vocabulary)
    same = drawn.token == wanted.token
    found["sampler, draws that differ"] = 1.0 - float(same.double().mean())
    for name in ("logprob", "sampling_logprob", "confidence"):
        mine, right = getattr(drawn, name)[same], getattr(wanted, name)[same]
        found[f"sampler, {name}"] = float((mine - right).norm() / right.norm())
    return found


def sampler_times(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    repeats: int,
    filters: bool = False,
    samplers: Sequence[str] = SAMPLERS,
) -> dict[str, float]:
    """Median seconds of drawing a token for each row from its logits, by each sampler, rules known.

    Args:
        filters: whether three quarters of the rows have top-k, top-p, or both.
    """
    logits, rules, streams, steps, slot = _draw_inputs(rows, columns, dtype, filters)
    vocabulary = Vocabulary(columns - 5, 7)
    asked = Asked.by(DrawRules(*(column[slot] for column in _columns(rules))))
    ways = {
        "torch": lambda: _by_torch(logits, rules, streams, steps, slot, vocabulary, asked),
        "triton": lambda: _by_kernels(logits, rules, streams, steps, slot, vocabulary, filters),
    }
    return {name: median_seconds(ways[name], repeats)[0] for name in samplers}


def _head_inputs(targets: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw_ = lambda *shape: torch.randn(*shape, generator=generator).to(platform.device(), dtype)
    hidden, weight = draw_(targets, width).requires_grad_(), (0.3 * draw_(columns, width)).requires_grad_()
    return hidden, weight, torch.randint(8, columns - 5, (targets,), generator=generator).to(platform.device())


def _draw_inputs(rows: int, columns: int, dtype: torch.dtype, filters: bool) -> tuple:
    """Logits [N, V], rules, streams and steps of 16 slots, and the slots of the rows."""
    which = torch.arange(16) // 4 * int(filters)
    generator, slots = torch.Generator().manual_seed(0), 16
    rules = DrawRules(
        greedy=torch.arange(slots) % 4 == 0,
        top_k=torch.tensor([0, 50, 0, 50])[which],
        top_p=torch.tensor([1, 1, 0.9, 0.9], dtype=torch.float64)[which],
        temperature=torch.linspace(0.6, 1.4, slots, dtype=torch.float64),
        confidence=torch.full((slots,), int(Confidence.SAMPLED)),
    )
    rules = DrawRules(*(column.to(platform.device()) for column in _columns(rules)))
    streams = torch.randint(2**62, (slots,), generator=generator).to(platform.device())
    steps = torch.arange(slots, device=platform.device())
    device_generator = torch.Generator(platform.device()).manual_seed(0)
    logits = 3 * torch.randn(rows, columns, generator=device_generator, device=platform.device())
    return logits.to(dtype), rules, streams, steps, torch.arange(rows, device=platform.device()) % slots


def _columns(rules: DrawRules) -> tuple[Tensor, ...]:
    return rules.greedy, rules.top_k, rules.top_p, rules.temperature, rules.confidence


def _by_kernels(logits, rules, streams, steps, slot, vocabulary, filters: bool = True):
    from megatron_dlm.diffusion.sampling_triton import draw_logits

    position = torch.arange(len(slot), device=slot.device)
    return draw_logits(logits, slot, position, rules, streams, steps, vocabulary.size, vocabulary.mask_id, filters)


def _by_torch(logits, rules, streams, steps, slot, vocabulary, asked: Asked | None = None):
    mine = DrawRules(*(column[slot] for column in _columns(rules)))
    position = torch.arange(len(slot), device=slot.device)
    uniform = uniforms(streams[slot], position, steps[slot])
    return draw(policy_scores(logits, mine.temperature, vocabulary), uniform, mine, asked)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024, help="positions that are drawn at a time")
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    reason = kernels.missing()
    if reason is not None:
        print(f"The kernels cannot run here, because {reason}. Run this on a host with a GPU.", file=sys.stderr)
        return 2
    columns = min(args.vocab_size, _SMALL)
    lines, good = [], True
    for dtype, tolerance in TOLERANCES.items():
        for name, value in differences(dtype, columns).items():
            limit = OTHER_TOKENS if "differ" in name else tolerance
            good &= value <= limit
            lines.append([str(dtype).removeprefix("torch."), name, f"{value:.1e}", f"{limit:.0e}"])
    print(table(["dtype", "what", "difference", "allowed"], lines))
    for dtype in TOLERANCES:
        for filters in (False, True):
            times = sampler_times(args.rows, args.vocab_size, dtype, args.repeats, filters)
            told = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items())
            how = " with top-k and top-p" if filters else ""
            print(f"sampler{how}, {args.rows} rows of {args.vocab_size} {dtype}: {told}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
