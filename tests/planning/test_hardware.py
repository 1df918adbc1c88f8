from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.planning.hardware import HARDWARE, Hardware, hardware_named


@pytest.mark.parametrize("name", HARDWARE)
def test_the_table_names_its_entries(name: str) -> None:
    assert hardware_named(name.upper()).name == name


def test_ratios_that_everybody_knows() -> None:
    """Bytes that a device reads in the time of a FLOP decide when decoding is bound by memory: 206 tokens on an H200,
    295 on an H100, 153 on an A100."""
    ratio = {name: one.bf16_flops / one.memory_bandwidth for name, one in HARDWARE.items()}
    assert ratio["h200"] == pytest.approx(206, abs=1)
    assert ratio["h100"] == pytest.approx(295, abs=1)
    assert ratio["a100"] == pytest.approx(153, abs=1)


def test_a_file_changes_an_entry(tmp_path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("base: h100\ninter_node_bandwidth: 25e9\ndevices_per_node: 4\nfp8_transposed: false\n")
    ours, other = hardware_named(str(path)), dict(inter_node_bandwidth=25e9, devices_per_node=4, fp8_transposed=False)
    assert ours == dataclasses.replace(HARDWARE["h100"], name="ours", **other)


def test_a_file_of_its_own(tmp_path) -> None:
    path = tmp_path / "cpu.yml"
    path.write_text(
        "name: a laptop\nmemory_bytes: 8e9\nbf16_flops: 1e11\nmemory_bandwidth: 2e10\n"
        "intra_node_bandwidth: 1e10\ninter_node_bandwidth: 1e9\nmatmul_fraction: 1\n"
    )
    assert hardware_named(str(path)) == Hardware("a laptop", 8e9, 1e11, 2e10, 1e10, 1e9, matmul_fraction=1)


@pytest.mark.parametrize(
    "text, told",
    [
        ("base: h1000\n", "base h1000 is not known"),
        ("base: h100\nflops: 3\n", "flops is not known"),
        ("memory_bytes: 3\n", "does not say bf16_flops, memory_bandwidth"),
        ("base: h100\nbf16_flops: many\n", "bf16_flops is 'many'"),
        ("base: h100\nbf16_flops: 0\n", "bf16_flops is 0. It must be above 0"),
        ("base: h100\nlayer_seconds: -1\n", "layer_seconds is -1. It must be 0 or more"),
        ("base: h100\nmatmul_fraction: 1.5\n", "matmul_fraction is 1.5. Give a fraction"),
        ("base: h100\ndevices_per_node: 2.5\n", "devices_per_node is 2.5. Give a whole number"),
        ("base: h100\nmemory_bytes: .nan\n", "memory_bytes is nan"),
        ("base: b200\nfp8_transposed: 0\n", "fp8_transposed is 0. Give true or false"),
        ("base: h100\nfp8_flops: true\n", "fp8_flops is True. Give a number"),
        ("- h100\n", "not a list of fields"),
        ("base: [h100\n", "not YAML"),
        ("base: [h100]\n", "base ['h100'] is not known"),
    ],
)
def test_refused_files(tmp_path, text: str, told: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        hardware_named(str(path))
    assert told in str(refused.value)


@pytest.mark.parametrize("name, told", [("h9", "is not known. Use one of a100-40"), ("no.yaml", "cannot be read")])
def test_refused_names(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        hardware_named(name)


def test_links() -> None:
    """Ring bandwidth of a group: the fast links inside a node; over nodes the adapters of its members in one node."""
    h100 = dataclasses.replace(HARDWARE["h100"], collective_fraction=1.0)
    assert [h100.link(size).name for size in (2, 8, 9, 16)] == ["node", "node", "network", "network"]
    assert h100.link(8).bandwidth == 450e9
    assert h100.link(16).bandwidth == 400e9  # eight adapters
    assert h100.link(16, 2).bandwidth == 200e9  # every second rank: four in each node
    assert h100.link(4, 8).bandwidth == 50e9  # one in each node
    assert h100.link(2, 4).name == "node" and h100.link(3, 4).name == "network"
    assert h100.link(4, 32).bandwidth == 50e9


def test_seconds_of_a_message() -> None:
    link = dataclasses.replace(HARDWARE["h100"], collective_fraction=0.5).link(2)
    assert link.seconds(225e9) == pytest.approx(1.0, rel=1e-4)
    assert link.seconds(225e9, 1000) == pytest.approx(1.0 + 1000 * link.latency)
    assert link.seconds(0, 1000) == 0
