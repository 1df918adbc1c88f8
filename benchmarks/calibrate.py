"""Measures one device for the cost model, and holds the model against a small one that really runs.

`python -m benchmarks.scaling --calibrate` prints an entry for `--hardware`. What one device cannot show (links between
devices) is printed as a guess and says so. With `--compare` a small model generates, recomputes log-probabilities and
trains in one process, and each phase's predicted seconds are divided by the measured ones.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_dlm.model.fp8 import quantise_rows, scaled_product
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.rollout.requirements import OLDEST_WITH_FP8

ROWS, WIDTH, WIDE = 1024, 512, 1536  # tokens of a row and widths of a layer, for a CPU; four times as much on a GPU


def main(compare: bool, device: str = "auto") -> int:
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU that torch can use, and there is none.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    hardware = measure(where)
    print(as_yaml(hardware, where))
    if compare:
        print(comparison(hardware, where))
    return 0


def measure(where: torch.device, seconds: float = 1.0) -> Hardware:
    """What this device reaches. `bf16_flops` is that of large matrix products in the type that is computed in:
    bfloat16 on a GPU, float32 on a CPU; fractions are of that.
    """
    gpu = where.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    scale = 4 if gpu else 1
    rows, width, wide = ROWS * scale, WIDTH * scale, WIDE * scale
    draw = lambda *shape: torch.randn(*shape, device=where, dtype=dtype)
    large = 8192 if gpu else 1536
    a, b = draw(large, large), draw(large, large)
    best = 2 * large**3 / _seconds(lambda: a @ b, where, seconds)
    x, w = draw(rows, width), draw(wide, width)
    typical = 2 * rows * width * wide / _seconds(lambda: F.linear(x, w), where, seconds)
    source = torch.ones((2**30 if gpu else 2**27) // 4, device=where)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), where, seconds)
    hidden = draw(rows, width)
    summed = 3 * hidden.numel() * hidden.element_size() / _seconds(lambda: hidden + x, where, seconds)
    heads, dim, tokens = 8, 64 if not gpu else 128, 512 * scale
    q, k, v = (draw(1, heads, tokens, dim) for _ in range(3))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=where).tril()
    attention = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    attended = 4 * heads * dim * tokens**2 / _seconds(attention, where, seconds)
    bandwidth = max(copied, summed)
    one = draw(8, width)
    weight = draw(width, width)

    def small_layer() -> None:  # about as many operations as a layer of the engine has
        y = one
        for _ in range(4):
            y = F.linear(y, weight)
        for _ in range(20):
            y = y + one

    start = _seconds(small_layer, where, seconds)
    memory = torch.cuda.get_device_properties(where).total_memory if gpu else _host_memory()
    return Hardware(
        name=torch.cuda.get_device_name(where) if gpu else "this CPU, one thread",
        memory_bytes=float(memory),
        bf16_flops=best,
        memory_bandwidth=bandwidth,
        intra_node_bandwidth=bandwidth / 4,
        inter_node_bandwidth=bandwidth / 40,
        devices_per_node=1,
        matmul_fraction=min(1.0, typical / best),
        attention_fraction=min(1.0, attended / best),
        bandwidth_fraction=min(1.0, summed / bandwidth),
        layer_seconds=start,
        pass_seconds=2 * start,
        **(fp8_products(where, large, (rows, width, wide), seconds) if has_fp8(where) else {}),
    )


def has_fp8(where: torch.device) -> bool:
    """Whether it multiplies numbers of FP8."""
    return where.type == "cuda" and torch.cuda.get_device_capability(where) >= OLDEST_WITH_FP8


def fp8_products(
    where: torch.device, large: int, typical: tuple[int, int, int], seconds: float
) -> dict[str, float | bool]:
    """Fields of `Hardware`: products with a scale for each row (model/fp8.py), large ones and those of a layer.

    Args:
        large: tokens, inputs and outputs of the large one. typical: those of the other.
    """

    def rate(tokens: int, inputs: int, outputs: int) -> float:
        pair = [quantise_rows(torch.randn(size, inputs, device=where)) for size in (tokens, outputs)]
        product = lambda: scaled_product(*pair[0], *pair[1], torch.bfloat16)
        return 2 * tokens * inputs * outputs / _seconds(product, where, seconds)

    best = rate(large, large, large)
    blackwell = where.type == "cuda" and torch.cuda.get_device_capability(where)[0] in (10, 11)
    return dict(fp8_flops=best, fp8_fraction=min(1.0, rate(*typical) / best), fp8_transposed=not blackwell)


def _seconds(work: Callable[[], object], where: torch.device, seconds: float) -> float:
    """Of a call, the median. On a CPU it is the time of this process alone, whatever else runs there."""
    return statistics.median(_times(work, where, seconds))


def _times(work: Callable[[], object], where: torch.device, seconds: float) -> list[float]:
    """Of single calls, for so long; at least three."""
    work()
    clock = time.perf_counter if where.type == "cuda" else time.process_time
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 1000):
        _wait(where)
        began = clock()
        work()
        _wait(where)
        found.append(clock() - began)
    return found


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _host_memory() -> int:
    from megatron_dlm.platform import memory

    return memory.available()


def as_yaml(hardware: Hardware, where: torch.device) -> str:
    """An entry for `--hardware`."""
    written = ("memory_bytes", "bf16_flops", "memory_bandwidth", "matmul_fraction", "attention_fraction")
    written += ("bandwidth_fraction", "layer_seconds", "pass_seconds")
    kind = "bfloat16" if where.type == "cuda" else "float32"
    lines = [f"name: {hardware.name!r}", f"# Measured on one device, in {kind}; bf16_flops is the best that was seen."]
    lines += [f"{name}: {getattr(hardware, name):.4g}" for name in written]
    if hardware.fp8_flops:
        lines += [f"{name}: {getattr(hardware, name):.4g}" for name in ("fp8_flops", "fp8_fraction")]
        lines.append(f"fp8_transposed: {str(hardware.fp8_transposed).lower()}")
    lines.append("# Not measured: links between devices. Put in what yours have.")
    lines += [f"{name}: {getattr(hardware, name):.4g}" for name in ("intra_node_bandwidth", "inter_node_bandwidth")]
    return "\n".join([*lines, f"devices_per_node: {8 if where.type == 'cuda' else 1}"])


# --------------------------------------------------------------------------------------------- predicted and measured
MODEL = dict(
    num_layers=8, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_query_groups=4, kv_channels=64,
    max_position_embeddings=2048, rotary_base=1e6, vocab_size=8192, block_size=4,
)  # fmt: skip
PROMPTS, SAMPLES, PROMPT, RESPONSE, BUDGET = 2, 4, 64, 64, 2048


def comparison(hardware: Hardware, where: torch.device, repeats: int = 3) -> str:
    """A table: seconds predicted and measured (the median), and their ratio. One process, one device; on a CPU
    one thread, and the time of the process alone.
    """
    from benchmarks.common import PACKED
    from benchmarks.rl_report import markdown
    from benchmarks.update_worker import Bench, Job
    from megatron_dlm.config.model import ModelConfig
    from megatron_dlm.config.rollout import RolloutConfig
    from megatron_dlm.planning.cost import step_cost
    from megatron_dlm.planning.layout import Layout, Workload

    gpu = where.type == "cuda"
    scale = 4 if gpu else 1
    sizes = dict(MODEL, hidden_size=512 * scale, ffn_hidden_size=1536 * scale, kv_channels=64 * (2 if gpu else 1))
    rollout = RolloutConfig(
        rollout_max_response_len=RESPONSE * scale, rollout_max_prompt_len=PROMPT, denoising_steps=4, threshold=0.9
    )
    job = Job(ModelConfig(**sizes, bf16=gpu), 8.0, PROMPTS, SAMPLES, PROMPT, rollout, BUDGET * scale, seed=1)
    bench = Bench(job)
    measured: dict[str, list[float]] = {"rollout": [], "old_logprobs": [], "train": []}
    bench.generate("static", 8)
    own = lambda wall, cpu: 1.0 if gpu else cpu / wall  # the share of the time that this process had
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        generated = bench.generate("static")
        share = own(time.perf_counter() - wall, time.process_time() - cpu)
        measured["rollout"].append(generated.seconds * share)
        wall, cpu = time.perf_counter(), time.process_time()
        updated = bench.update(PACKED, generated.traces, None)
        share = own(time.perf_counter() - wall, time.process_time() - cpu)
        measured["old_logprobs"].append(updated.seconds["old log-probs"] * share)
        measured["train"].append((updated.seconds["forward+backward"] + updated.seconds["optimizer"]) * share)
    copies = statistics.mean(_copies(trace, 4) for trace in generated.traces)
    work = Workload(
        prompts=PROMPTS, samples=SAMPLES, prompt_length=PROMPT, responses=(RESPONSE * scale,), block_size=4,
        steps_per_block=copies, updates=1, row_budget=BUDGET * scale, attention="dense", itemsize=2 if gpu else 4,
    )  # fmt: skip
    layout = Layout(world=1, distributed_optimizer=False, overlap=False)
    cost = step_cost(bench.session.model, layout, work, hardware)
    # One pass over the rows of a single update, which a trainer would leave out.
    second = step_cost(bench.session.model, layout, Workload(**{**_fields(work), "updates": 2}), hardware)
    predicted = {
        "rollout": cost.phases["rollout"].seconds,
        "old_logprobs": second.phases["old_logprobs"].seconds * 2 * _share_of_half(cost, second),
        "train": cost.phases["train"].seconds,
    }
    lines = [("phase", "predicted, s", "measured, s", "predicted / measured", "most of it is")]
    for name, times in measured.items():
        seconds = statistics.median(times)
        bound = (second if name == "old_logprobs" else cost).phases[name].bound
        lines.append((name, f"{predicted[name]:.2f}", f"{seconds:.2f}", f"{predicted[name] / seconds:.2f}", bound))
    rows = cost.phases["train"].facts
    head = f"rows predicted {rows['rows']} of {rows['row_tokens']}, really {updated.rows} of {updated.length}"
    return f"# {head}; {copies:.2f} denoising steps per block\n\n{markdown(lines)}"


def _share_of_half(cost, second) -> float:
    """Rows of one whole update over twice those of a half."""
    whole, half = cost.phases["train"].facts, second.phases["train"].facts
    return whole["rows"] * whole["row_tokens"] / (2 * half["rows"] * half["row_tokens"])


def _fields(work) -> dict:
    import dataclasses

    return {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}


def _copies(trace, block: int) -> float:
    """Denoising steps per block of a response."""
    import numpy as np

    blocks = (np.arange(len(trace.steps)) + len(trace.prompt_ids)) // block
    return len(set(zip(blocks.tolist(), trace.steps.tolist()))) / len(set(blocks.tolist()))
