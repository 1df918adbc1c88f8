"""Bytes against collectives that really run; and what must hold of any cost."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning.cost import PHASES, parameters_of_a_rank, step_cost
from megatron_dlm.planning.hardware import HARDWARE
from megatron_dlm.planning.layout import Layout, Workload, lengths, supervised
from tests.harness import pool
from tests.planning import traffic

H100 = HARDWARE["h100"]


def small(**changes: object) -> ModelConfig:
    return resolve(ModelConfig(**traffic.SIZES | changes), 64)


def preset(name: str) -> ModelConfig:
    return resolve(ModelConfig(model_preset=name), None)


def small_workload(layout: Layout, rows: int) -> Workload:
    """As many rows for each data rank as `traffic.step` has, each of one prompt with two responses."""
    return supervised(
        rows * layout.data, traffic.PROMPT, (traffic.RESPONSE,), samples=traffic.SAMPLES, steps_per_block=2.0,
        row_budget=192, itemsize=4, attention="dense",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ bytes, for real
TP = dict(tensor_model_parallel_size=2)
PP = dict(pipeline_model_parallel_size=2)
CASES = {
    "tensor and sequence": (TP | dict(sequence_parallel=True), dict(tp=2, sequence_parallel=True), {}, 1, 0.01),
    "tensor": (TP, dict(tp=2), {}, 2, 0.01),
    "pipeline": (PP, dict(pp=2), {}, 3, 0.01),
    "interleaved": (PP | dict(num_virtual_stages_per_pipeline_rank=2), dict(pp=2, vpp=2), {}, 2, 0.01),
    "context": (dict(context_parallel_size=2, use_distributed_optimizer=True), dict(cp=2), {}, 1, 0.01),
    "data": ({}, dict(distributed_optimizer=False), {}, 2, 0.01),
    "distributed optimizer": (dict(use_distributed_optimizer=True), {}, {}, 2, 0.01),
    "experts": (
        dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1), dict(ep=2, etp=1,
        distributed_optimizer=False), traffic.EXPERTS, 1, 0.03,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_collectives_that_run(name: str) -> None:
    """The sum of what is sent in a training step, over all collectives of more than a kilobyte, mean over ranks."""
    parallel, sizes, model, rows, tolerance = CASES[name]
    layout = Layout(world=2, **sizes)
    train = step_cost(small(**model), layout, small_workload(layout, rows), H100).phases["train"]
    assert (train.facts["rows"], train.facts["row_tokens"]) == (rows, 192)
    results = pool(2).run(traffic.step, parallel, model, rows, 1000)
    sent = sum(sum(of_rank.values()) for of_rank, _, _ in results) / 2
    assert train.bytes == pytest.approx(sent, rel=tolerance) and sent > 0
    # The stage that has most parameters is that of some rank.
    most = max(parameters for _, _, parameters in results)
    assert parameters_of_a_rank(small(**model), layout)[2] == pytest.approx(most, rel=0.01)


def test_seconds_of_a_collective_are_its_bytes_over_its_link() -> None:
    layout = Layout(world=16, tp=16, sequence_parallel=True, rollout_tp=8)
    model = small(num_attention_heads=16, num_query_groups=16)
    slow = dataclasses.replace(H100, network_latency=0.0)
    train = step_cost(model, layout, small_workload(layout, 1), slow).phases["train"]
    bandwidth = min(8 * slow.inter_node_bandwidth, slow.intra_node_bandwidth) * slow.collective_fraction
    assert train.sent.keys() == {("tensor", "network")}
    assert train.parts["tensor"] == pytest.approx(train.sent["tensor", "network"] / bandwidth)


# ------------------------------------------------------------------------------------------------------------ pipelines
def test_a_pipeline_waits_at_its_ends() -> None:
    """The share of time that stages wait is (p - 1) / m of the time in which they compute, / v if interleaved."""
    model, work = preset("sdar-8b"), Workload(prompts=8, samples=8, rollout=False)
    for layout in (Layout(world=4, pp=4), Layout(world=4, pp=4, vpp=3)):
        train = step_cost(model, layout, work, H100).phases["train"]
        bubble, others = train.parts["bubble"], ("products", "attention", "memory")
        share = bubble / sum(train.parts[name] for name in others)
        assert share == pytest.approx(3 / layout.vpp / train.facts["rows"], rel=1e-6)


def test_layouts_share_the_work() -> None:
    """What a rank computes, times the ranks, is what one rank would, where rows are cut alike; only experts of other
    ranks move."""
    model, work = preset("sdar-30b-a3b"), Workload(prompts=8, samples=8, rollout=False)
    alone = step_cost(model, Layout(), work, H100).flops
    for layout in (
        Layout(world=4, tp=4, sequence_parallel=True), Layout(world=4, pp=4), Layout(world=4, cp=4),
        Layout(world=8, tp=2, pp=2, cp=2), Layout(world=4, tp=4, ep=4, etp=1, sequence_parallel=True),
    ):  # fmt: skip
        assert step_cost(model, layout, work, H100).flops * layout.world == pytest.approx(
            alone,
            rel=0.03 if layout.cp > 1 else 1e-6,  # a part is rounded up, too
        )


# ------------------------------------------------------------------------------------------------------ what must hold
@pytest.mark.parametrize("name", ["sdar-1.7b", "sdar-8b", "sdar-30b-a3b"])
def test_more_of_anything_costs_no_less(name: str) -> None:
    model, layout = preset(name), Layout(world=8, tp=2, sequence_parallel=True)
    less = Workload(prompts=16, samples=8, updates=2, responses=lengths(300, 1000))
    base = step_cost(model, layout, less, H100)
    for changes in (
        dict(prompts=32), dict(prompt_length=512), dict(responses=lengths(600, 2000)), dict(steps_per_block=3.0),
        dict(attention="dense"),
    ):  # fmt: skip
        more = step_cost(model, layout, dataclasses.replace(less, **changes), H100)
        assert more.phases["train"].seconds > base.phases["train"].seconds, changes
        if "attention" not in changes:
            assert more.phases["rollout"].seconds > base.phases["rollout"].seconds, changes
    again = step_cost(model, dataclasses.replace(layout, recompute="full"), less, H100)
    assert again.phases["train"].flops > base.phases["train"].flops
    faster = step_cost(model, layout, less, HARDWARE["b200"])
    assert all(faster.phases[name].seconds <= base.phases[name].seconds for name in base.phases)


def test_overlap_hides_and_never_adds() -> None:
    model, work = preset("sdar-8b"), Workload(prompts=64, samples=8)
    layout = Layout(world=64, tp=4, sequence_parallel=True)
    hidden = step_cost(model, layout, work, H100).phases["train"]
    shown = step_cost(model, dataclasses.replace(layout, overlap=False), work, H100).phases["train"]
    assert hidden.sent == shown.sent and 0 < hidden.parts["data"] < shown.parts["data"]


def test_more_devices_take_no_longer_to_generate() -> None:
    model, work = preset("sdar-8b"), Workload(prompts=64, samples=8)
    seconds = [step_cost(model, Layout(world=world), work, H100).phases["rollout"].seconds for world in (8, 16, 64)]
    assert seconds == sorted(seconds, reverse=True)


def test_phases_are_those_that_happen() -> None:
    model, layout = preset("sdar-1.7b"), Layout(world=8, pp=2)
    plain = Workload(prompts=8, samples=8, updates=4)
    everything = dataclasses.replace(plain, reference=True, value_model=True)
    assert tuple(step_cost(model, layout, everything, H100).phases) == PHASES
    cost = step_cost(model, layout, plain, H100)
    assert tuple(cost.phases) == ("rollout", "old_logprobs", "train", "refit")
    passes, train = cost.phases["old_logprobs"], cost.phases["train"]
    # Three of four updates are passed forward only, a third of a step's products.
    assert passes.parts["products"] == pytest.approx(train.parts["products"] / 4)
    one = dataclasses.replace(plain, updates=1)
    assert "old_logprobs" not in step_cost(model, layout, one, H100).phases
    assert tuple(step_cost(model, layout, dataclasses.replace(plain, rollout=False), H100).phases) == ("train",)


def test_refit_moves_what_is_not_there() -> None:
    model, work = preset("sdar-8b"), Workload(prompts=8, samples=8)
    weights = 2 * 8.19e9

    def moved(**layout: object) -> float:
        return step_cost(model, Layout(world=8, **layout), work, H100).phases["refit"].bytes

    assert moved() == moved(tp=4, sequence_parallel=True) == 0
    assert moved(pp=2) == pytest.approx(weights / 2, rel=1e-3)  # the other stage's
    assert moved(tp=4, rollout_tp=1) == pytest.approx(weights * 3 / 4, rel=1e-3)
    assert moved(tp=1, rollout_tp=4) == 0  # a part of what is there
    assert moved(tp=2, pp=2) == pytest.approx(weights / 4, rel=1e-3)


@pytest.mark.parametrize(
    "layout, told",
    [
        (dict(world=12, tp=8), "12 devices cannot be divided into groups of tp x cp x pp = 8"),
        (dict(world=16, tp=16), "tp 16 does not divide the 8 key/value heads"),
        (dict(world=10, pp=5), "pp x vpp 5 does not divide the 36 layers"),
        (dict(world=8, vpp=2), "vpp 2 needs 2 pipeline stages"),
        (dict(world=8, sequence_parallel=True), "sequence parallelism needs tp of 2"),
        (dict(world=8, rollout_tp=3), "rollout_tp = 3"),
        (dict(world=0), "world is 0"),
    ],
)
def test_layouts_that_cannot_be(layout: dict, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        step_cost(preset("sdar-8b"), Layout(**layout), Workload(), H100)
    assert told in str(refused.value)


def test_lengths_have_their_mean_and_their_longest() -> None:
    for mean, longest in ((600, 2000), (3000, 8192), (90, 100)):
        found = lengths(mean, longest)
        assert sum(found) / len(found) == pytest.approx(mean, rel=0.01) and max(found) <= longest
        assert list(found) == sorted(found) and found[0] >= 1
    assert max(lengths(600, 2000)) == 2000  # the tail is cut, as generation cuts it
    with pytest.raises(ConfigError, match="cannot have 300 tokens on average and 200 at most"):
        lengths(300, 200)
