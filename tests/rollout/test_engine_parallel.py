"""The engine on tensor-parallel ranks, and on replicas that share experts, against one process."""

from __future__ import annotations

import dataclasses

import pytest

from tests.harness import pool

MIXED = dict(
    num_layers=4,
    num_experts=8,
    moe_router_topk=4,
    moe_ffn_hidden_size=16,
    moe_first_k_dense=1,
    moe_shared_expert_intermediate_size=16,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
    rotary_percent=0.5,
    add_qkv_bias=True,
)
TIGHT = dict(kv_page_size=4, kv_cache_gib=24 * 512 / 2**30)  # 24 pages of a rank; one text needs 7
LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2), {}),
    "tp2, few pages": (2, dict(tensor_model_parallel_size=2), {}, TIGHT),
    "tp2, rounds": (2, dict(tensor_model_parallel_size=2), {}, dict(rollout_rounds_per_sync=3)),
    "ep2": (2, dict(expert_model_parallel_size=2), dict(num_experts=4, moe_router_topk=2)),
    "tp2 ep2": (
        4,
        dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True),
        dict(num_experts=4, moe_router_topk=2),
    ),
    "tp2 mixed layers": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), MIXED),
    "pp2 mixed layers": (2, dict(pipeline_model_parallel_size=2), MIXED),
}


def make_rig(parallel: dict, sizes: dict, engine: dict):
    """A rig in float32, weights drawn alike whatever the layout."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.config.rollout import RolloutConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, model_config, vocabulary

    settings, folder = ParallelConfig(**parallel), sizes.pop("folder")
    session = Session(model_config(**sizes), settings, Words(), initialize(settings, seed=1), vocabulary())
    state = session.train_state(None, 1)
    if folder.exists():
        load(state, folder, with_optimizer=False)
    config = RolloutConfig(rollout_max_response_len=11, **{"max_running_requests": 5, **engine})
    return state, RolloutRig.open(session, state, config, 13, 11)


def generate_all(parallel: dict, sizes: dict, save_to=None, engine: dict | None = None) -> tuple[int, list]:
    from megatron_dlm.checkpoint.distributed import save
    from tests.rollout.test_engine import SAMPLING, requests

    state, rig = make_rig(parallel, dict(sizes), engine or {})
    if save_to is not None:
        save(state, save_to, 0, {}, with_optimizer=False)
    wanted = requests(11, dataclasses.replace(SAMPLING, threshold=0.2))
    mine = wanted[:9] if rig.replica == 0 else wanted[9:]  # one replica has far more to do than the other
    traces = rig.engine.run(wanted if rig.num_replicas == 1 else mine)
    traces.sort(key=lambda trace: [request.prompt_key for request in wanted].index(trace.prompt_key))
    return rig.replica, [(trace.prompt_key, trace.response_ids.tolist(), trace.steps.tolist()) for trace in traces]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_generate_what_one_process_does(tmp_path, layout: str) -> None:
    world, parallel, sizes, *engine = LAYOUTS[layout]
    sizes = dict(sizes, folder=tmp_path / "start")
    ((_, expected),) = pool(1).run(generate_all, {}, sizes, tmp_path / "start")
    found: dict[int, list] = {}
    for replica, traces in pool(world).run(generate_all, parallel, sizes, None, *engine):
        assert found.setdefault(replica, traces) == traces  # tensor-parallel ranks agree
    assert [trace for replica in sorted(found) for trace in found[replica]] == expected
    assert sorted(key for key, _, _ in expected) == sorted(f"p{n}" for n in range(11))


def draw_shards() -> list:
    """On each of two ranks, from its half of the logits: what the kernels draw, and what torch draws."""
    from unittest import mock

    import torch

    from megatron_dlm import platform
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.policy import Vocabulary
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.rollout import denoiser as denoiser_module
    from megatron_dlm.rollout.batch import RunningBatch
    from megatron_dlm.rollout.denoiser import Denoiser

    groups = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    generator = torch.Generator().manual_seed(0)
    batch = RunningBatch(4, 32, 70, platform.device())
    batch.stream[:], batch.temperature[:] = torch.arange(5) * 1234567, torch.linspace(0.5, 1.5, 5)
    batch.greedy[3], batch.confidence[:] = True, torch.arange(5) % 4
    logits = 3 * torch.randn(20, 96, generator=generator)
    mine = logits[:, 48 * groups.tp_rank : 48 * (groups.tp_rank + 1)].to(platform.device())
    slot, place = torch.arange(20, device=batch.device) % 5, torch.arange(20, device=batch.device)
    found = []
    for fused in (True, False):
        denoiser = Denoiser(batch, Vocabulary(90, 70), groups.tp, fused)
        denoiser._rows = 8  # several parts
        with mock.patch.object(denoiser_module, "_GATHERED_BYTES", 8 * 96 * 4):
            draws = denoiser.draw(mine, slot, place)
        found.append([draws.token.tolist(), draws.logprob.tolist(), draws.confidence.tolist()])
    return found


def test_kernels_draw_from_shards_what_torch_draws() -> None:
    pytest.importorskip("triton")
    first, second = pool(2).run(draw_shards)
    assert first == second
    (token, *values), (wanted, *right) = first
    assert token == wanted and len(set(token)) > 5
    for mine, other in zip(values, right):
        assert mine == pytest.approx(other, abs=2e-6)
