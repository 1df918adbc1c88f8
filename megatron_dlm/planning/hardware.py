"""What a device and its links can do: the manufacturer's figures, and which fraction of them software reaches.

Figures of the first kind are from data sheets. Those of the second kind (`*_fraction`, latencies) are ASSUMPTIONS for
every entry of the table: nothing here has been measured on a GPU. `python -m benchmarks.scaling --calibrate` measures
a machine and prints an entry as YAML, which `hardware_named` reads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config import yaml_file
from megatron_dlm.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, the node it stands in, and the network between nodes. Bytes, FLOPs and seconds; bandwidths are bytes
    per second.
    """

    name: str
    """What reports call it."""
    memory_bytes: float
    """Memory of a device. The table has the data sheet's decimal gigabytes; devices show a little more."""
    bf16_flops: float
    """Dense bfloat16 FLOP per second at best, without sparsity (data sheet)."""
    memory_bandwidth: float
    """Of the device's own memory at best (data sheet)."""
    intra_node_bandwidth: float
    """Of one device's links to its node, in one direction: half of the data sheet's NVLink total, which counts both."""
    inter_node_bandwidth: float
    """Of one device's share of its node's network, in one direction. Not a property of the device: the table assumes
    one adapter per device, as in the manufacturer's own systems."""
    devices_per_node: int = 8
    """Devices that the fast links connect."""
    fp8_flops: float = 0.0
    """Dense 8-bit floating-point FLOP per second at best (data sheet); 0 where there is no such unit."""
    fp8_fraction: float = 0.6
    """Of `fp8_flops`, in the same products as `matmul_fraction`. Assumption: a little less, because the passes over
    memory are the same beside half the time."""
    fp8_transposed: bool = True
    """Whether products of 8-bit numbers with one scale want both factors in one layout, so that transposed copies are
    kept: Hopper, not Blackwell."""
    matmul_fraction: float = 0.65
    """Of `bf16_flops`, in matrix products of the sizes of a training row. Assumption; public reports of large products
    on H100 and H200 lie between 0.6 and 0.75."""
    attention_fraction: float = 0.35
    """Of `bf16_flops`, in attention over the pairs that are visible. Assumption: masks that are not causal, and
    backward passes, stay well below what causal kernels publish (0.5 to 0.75 forward on H100)."""
    bandwidth_fraction: float = 0.8
    """Of `memory_bandwidth`, in passes over weights, keys and activations. Assumption; simple copies reach
    about 0.9."""
    collective_fraction: float = 0.75
    """Of the links' bandwidths, in collectives of large messages. Assumption; large all-reduces of 8 devices on NVLink
    publish 0.75 to 0.8 of it."""
    collective_latency: float = 15e-6
    """Of a collective within a node, beside what its bytes take. Assumption."""
    network_latency: float = 30e-6
    """Of a collective over several nodes. Assumption; it grows with the number of nodes, which is not modelled."""
    layer_seconds: float = 25e-6
    """What one layer takes at least in a pass of the engine, however little it computes: its kernels' starts and ends.
    Assumption for rounds that are captured as CUDA graphs; without graphs it is rather 100 to 200 microseconds."""
    pass_seconds: float = 300e-6
    """What a pass of the engine takes beside its layers: sampling, scheduling, the host. Assumption."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise ConfigError(f"hardware {self.name}: {field.name} is {value!r}. Give true or false.")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"hardware {self.name}: {field.name} is {value!r}. Give a number.")
            low = field.name in _MAY_BE_ZERO
            if value < 0 or (value == 0 and not low):
                raise ConfigError(
                    f"hardware {self.name}: {field.name} is {value}. It must be {'0 or more' if low else 'above 0'}."
                )
            if field.name.endswith("_fraction") and value > 1:
                raise ConfigError(f"hardware {self.name}: {field.name} is {value}. Give a fraction of at most 1.")
        if self.devices_per_node != int(self.devices_per_node):
            raise ConfigError(
                f"hardware {self.name}: devices_per_node is {self.devices_per_node}. Give a whole number."
            )

    def fp8_rate(self) -> float:
        """FLOP per second of products in FP8.

        Raises:
            ConfigError: there are none.
        """
        if not self.fp8_flops:
            raise ConfigError(f"hardware {self.name} has no products in FP8. Use another, or leave FP8 out.")
        return self.fp8_flops * self.fp8_fraction

    def link(self, size: int, stride: int = 1) -> Link:
        """What a group of `size` ranks has, each `stride` ranks after the other, in a job whose ranks fill node by
        node.

        Within a node it is the device's own links. Over nodes a ring leaves each node through the adapters of all its
        members there, so that a group with g ranks per node has g adapters' bandwidth, at most that of the fast links.
        (Other groups of the same kind use the other adapters at the same time.)
        """
        if (size - 1) * stride < self.devices_per_node:
            return Link("node", self.intra_node_bandwidth * self.collective_fraction, self.collective_latency)
        together = max(1, min(size, self.devices_per_node // stride))
        bandwidth = min(self.intra_node_bandwidth, together * self.inter_node_bandwidth)
        return Link("network", bandwidth * self.collective_fraction, self.network_latency)


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes per second that each rank of a group sends and receives at once, and the seconds of a message of nothing.

    name: 'node' or 'network'.
    """

    name: str
    bandwidth: float
    latency: float

    def seconds(self, sent: float, messages: float = 1) -> float:
        """Of `messages` collectives in which each rank sends `sent` bytes in all."""
        return sent / self.bandwidth + messages * self.latency if sent else 0.0


_MAY_BE_ZERO = ("fp8_flops", "collective_latency", "network_latency", "layer_seconds", "pass_seconds")
_HOPPER = dict(bf16_flops=989e12, fp8_flops=1979e12, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9)
_AMPERE = dict(bf16_flops=312e12, intra_node_bandwidth=300e9, inter_node_bandwidth=25e9)

HARDWARE: dict[str, Hardware] = {
    "a100-40": Hardware("a100-40", memory_bytes=40e9, memory_bandwidth=1.555e12, **_AMPERE),
    "a100": Hardware("a100", memory_bytes=80e9, memory_bandwidth=2.039e12, **_AMPERE),
    "h100": Hardware("h100", memory_bytes=80e9, memory_bandwidth=3.35e12, **_HOPPER),
    "h200": Hardware("h200", memory_bytes=141e9, memory_bandwidth=4.8e12, **_HOPPER),
    "b200": Hardware(
        "b200",
        memory_bytes=180e9,
        bf16_flops=2.25e15,
        fp8_flops=4.5e15,
        fp8_transposed=False,
        memory_bandwidth=8e12,
        intra_node_bandwidth=900e9,
        inter_node_bandwidth=50e9,
    ),
}
"""Devices in SXM form in nodes of eight. Networks: 200 Gbit/s per device with A100, 400 Gbit/s with the others."""


def hardware_named(name: str) -> Hardware:
    """An entry of the table, or one from a YAML file: a mapping of the fields of `Hardware`. With `base: NAME` the file
    changes an entry of the table.

    Raises:
        ConfigError: an unknown name, or a file that does not say what it must.
    """
    if name.lower() in HARDWARE:
        return HARDWARE[name.lower()]
    if Path(name).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"hardware {name} is not known. Use one of {', '.join(HARDWARE)}, or a .yaml file.")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hardware file {name} cannot be read ({error}). Check the path.") from None
    values = yaml_file.parse_value(text, f"hardware file {name}")
    if not isinstance(values, dict):
        raise ConfigError(f"hardware file {name} is not a list of fields. Write lines such as memory_bytes: 80e9.")
    return _from_values(values, name)


def _from_values(values: dict[str, Any], name: str) -> Hardware:
    fields = {field.name: field for field in dataclasses.fields(Hardware)}
    values = dict(values)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in HARDWARE):
        raise ConfigError(f"hardware file {name}: base {base} is not known. Use one of {', '.join(HARDWARE)}.")
    for key in values:
        if key not in fields:
            raise ConfigError(f"hardware file {name}: {key} is not known. It has {', '.join(fields)}, and base.")
    if base is not None:
        return dataclasses.replace(HARDWARE[base], **{"name": Path(name).stem, **values})
    values.setdefault("name", Path(name).stem)
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in values]
    if missing:
        raise ConfigError(f"hardware file {name} does not say {', '.join(missing)}. Add them, or a base to change.")
    return Hardware(**values)
