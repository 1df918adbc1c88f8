"""How fast a GPU could generate at best: the time of a pass from the bytes it must read and the products it must form.

A pass gives each of S sequences the B tokens of a block. It multiplies with all matrices once, reads the keys and
values of S contexts, and writes the logits:

    max(bytes of the matrices / bandwidth, 2 * parameters * B * S / FLOP/s)
    + S * context * bytes of a token's keys and values / bandwidth
    + B * S * vocabulary * 4 / bandwidth

Products and reads of the cache do not overlap in it, kernels take no time to start, and a block of k denoising steps
takes k + 1 passes. An engine that commits a block together with the next one's first step reads the matrices less
often, so that with few sequences it may come out above 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.plain_loop import Shape


@dataclass(frozen=True, slots=True)
class Hardware:
    """Figures of the manufacturer: bytes and dense bfloat16 FLOP per second."""

    bandwidth: float
    flops: float


HARDWARE = {
    "H200": Hardware(4.8e12, 989e12),
    "H100": Hardware(3.35e12, 989e12),
    "H20": Hardware(4.0e12, 148e12),
    "A100": Hardware(2.0e12, 312e12),
    "A800": Hardware(2.0e12, 312e12),
}
"""By a word of the device's name."""


def known(device: str) -> Hardware | None:
    """The figures of a device whose name contains one of the names above as a word."""
    words = device.replace("-", " ").split()
    return next((HARDWARE[word] for word in words if word in HARDWARE), None)


def layer_parameters(shape: Shape) -> int:
    """Parameters of the matrices of all layers."""
    width, heads = shape.hidden_size, shape.heads + 2 * shape.kv_heads
    return shape.num_layers * (width * (heads + shape.heads) * shape.head_dim + 3 * width * shape.ffn_hidden_size)


def matrix_parameters(shape: Shape) -> int:
    """Parameters that every token of a pass is multiplied with: all matrices but the embedding."""
    return layer_parameters(shape) + shape.vocab_size * shape.hidden_size


def seconds_of_a_pass(
    shape: Shape, itemsize: int, hardware: Hardware, sequences: int, context: float, block: int, in_fp8: bool = False
) -> float:
    """The least time of a pass that gives `sequences` sequences a block each, behind `context` tokens.

    Args:
        itemsize: bytes of a weight, and of a number in the cache.
        in_fp8: the weights of the layers have one byte, and are multiplied at twice the rate. The head's are not.
    """
    layers, rows = layer_parameters(shape), block * sequences
    head = matrix_parameters(shape) - layers
    token = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * itemsize
    weights = layers * (1 if in_fp8 else itemsize) + head * itemsize
    products = 2 * rows * (layers / (2 if in_fp8 else 1) + head)
    matrices = max(weights / hardware.bandwidth, products / hardware.flops)
    return matrices + (sequences * context * token + rows * shape.vocab_size * 4) / hardware.bandwidth


def tokens_per_second(seconds: float, sequences: int, block: int, steps_per_block: float) -> float:
    """What such passes come to: each of the sequences gains a block every `steps_per_block` + 1 passes."""
    return sequences * block / (steps_per_block + 1) / seconds
