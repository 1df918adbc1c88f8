"""The start of a mask's embedding: the same row in every layout, against sums over the whole table."""

from __future__ import annotations

import pytest
import torch

from tests.harness import pool

HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
TRAINED, MASK = 47, 50  # rows 47 to 49 and those from 51 on are of nobody
MASK_WITHIN = 30


def case(tp: int, pp: int, tied: bool, bf16: bool, mask_id: int, how: str | int) -> dict:
    """This rank's tables before and after, and the master weights, which one step with a rate of nothing shows."""
    from megatron_dlm.checkpoint.mask_embedding import set_row
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, disturb, model_config, vocabulary

    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, use_distributed_optimizer=bf16
    )
    groups = initialize(parallel, seed=1)
    model = model_config(untie_embeddings_and_output_weights=not tied, bf16=bf16)
    state = Session(model, parallel, Words(), groups, vocabulary()).train_state(OptimizerConfig(), 10)
    if tied:  # the two stages hold one table
        for _, parameter in state.named_parameters():
            disturb(torch.nn.ParameterDict({"table": parameter}), 0)
    else:
        disturb(state.module, groups.tp_rank)
    tables = {name: value for name, value in state.named_parameters() if name in (HEAD, EMBEDDING)}
    before = {name: value.detach().clone() for name, value in tables.items()}
    set_row(state, mask_id, TRAINED, how, seed=3)
    after = {name: value.detach().clone() for name, value in tables.items()}
    with torch.no_grad():
        for value in tables.values():
            value.zero_()
    for one in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        if bf16:
            one._copy_main_params_to_model_params()
    masters = {name: value.detach().clone() for name, value in tables.items()} if bf16 else after
    return {"before": before, "after": after, "masters": masters, "first": groups.tp_rank}


def whole(results: list[dict], what: str, name: str) -> torch.Tensor:
    return torch.cat([result[what][name] for result in results if name in result[what]])


@pytest.mark.parametrize(("mask_id", "how"), [(MASK, "mean"), (MASK_WITHIN, "normal"), (MASK, 40)])
def test_under_tensor_parallelism(mask_id: int, how: str | int) -> None:
    """The mask's row lies on one rank and the others on both; the master weights of a bf16 model follow."""
    results = pool(2).run(case, 2, 1, False, True, mask_id, how)
    known = [row for row in range(TRAINED) if row != mask_id]
    for name in (HEAD, EMBEDDING):
        before, after = (whole(results, what, name) for what in ("before", "after"))
        others = [row for row in range(len(before)) if row != mask_id]
        assert torch.equal(before[others], after[others])
        assert torch.equal(whole(results, "masters", name), after)
        mean, deviation = before[known].double().mean(0), before[known].double().std(0, correction=0)
        noise = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        expected = {"mean": mean, "normal": mean if name == HEAD else mean + deviation * noise}.get(how, before[40])
        torch.testing.assert_close(after[mask_id].double(), expected.double(), rtol=1e-2, atol=1e-6)  # bf16
        assert not torch.equal(before[mask_id], after[mask_id])


def test_tied_tables_of_two_stages_stay_equal() -> None:
    first, last = pool(2).run(case, 1, 2, True, False, MASK, "mean")
    (one,), (other,) = first["after"].values(), last["after"].values()
    assert one.shape == other.shape and torch.equal(one, other)
    (before,) = first["before"].values()
    torch.testing.assert_close(one[MASK], before[:TRAINED].mean(0))
    assert not torch.equal(before[MASK], one[MASK])
