"""One SFT step and one TraceRL step of a model with experts, in the layouts that share the experts out, against one
process. The comparisons are those of test_equivalence.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import pool
from tests.parallel.jobs import EXPERTS, Job, assert_same, begin, gradients_of, step_of

TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
EP2 = dict(expert_model_parallel_size=2)
LAYOUTS = {
    "ep2": (2, EP2),
    "ep2 distributed": (2, EP2 | dict(use_distributed_optimizer=True)),
    "tp2 sp": (2, TP2_SP),  # each expert is split
    "tp2 sp ep2 etp1": (2, TP2_SP | EP2 | dict(expert_tensor_parallel_size=1)),  # each expert is whole
    "tp2 sp ep2 etp1 dp2": (4, TP2_SP | EP2 | dict(expert_tensor_parallel_size=1, use_distributed_optimizer=True)),
    "tp2 sp ep2": (4, TP2_SP | EP2),  # shared out and split
    "pp2 ep2": (4, EP2 | dict(pipeline_model_parallel_size=2)),
}
# With the distributed optimizer a rank has the gradients of its shard only; its step tells.
WITH_WHOLE_GRADIENTS = [name for name, (_, parallel) in LAYOUTS.items() if "use_distributed_optimizer" not in parallel]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[bool, Path]:
    """By precision."""
    folders = {}
    for float64 in (True, False):
        folders[float64] = tmp_path_factory.mktemp("float64" if float64 else "float32") / "start"
        pool(1).run(begin, Job(float64=float64), folders[float64])
    return folders


@pytest.fixture(scope="module")
def alone(checkpoints) -> dict:
    """One process: gradients and step of both stages."""
    found = {}
    for stage in ("sft", "tracerl"):
        found["gradients", stage] = pool(1).run(gradients_of, Job(stage), checkpoints[True])[0]
        found["step", stage] = pool(1).run(step_of, Job(stage), checkpoints[False])[0]
    return found


@pytest.mark.parametrize("stage", ["sft", "tracerl"])
@pytest.mark.parametrize("layout", WITH_WHOLE_GRADIENTS)
def test_gradients_are_those_of_one_process(checkpoints, alone, layout: str, stage: str) -> None:
    world, parallel = LAYOUTS[layout]
    metrics, expected, count = alone["gradients", stage]
    assert count > 1 and sum(".local_experts." in name for name in expected) == 2 * 4 * 3
    for found_metrics, found, _ in pool(world).run(
        gradients_of, Job.of(stage, parallel, EXPERTS, True), checkpoints[True]
    ):
        for name in metrics:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name
        assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("stage", ["sft", "tracerl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_one_process(checkpoints, alone, layout: str, stage: str) -> None:
    world, parallel = LAYOUTS[layout]
    metrics, norm, start, expected = alone["step", stage]
    for found_metrics, found_norm, before, after in pool(world).run(
        step_of, Job.of(stage, parallel, EXPERTS, False), checkpoints[False]
    ):
        for name in metrics:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
        assert found_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert found_norm == pytest.approx(norm, rel=1e-5)
        assert before.keys() == start.keys() and all(torch.equal(before[name], start[name]) for name in start)
        moved = [{name: one[name] - start[name] for name in start} for one in (after, expected)]
        assert_same(*moved, 1e-4)
