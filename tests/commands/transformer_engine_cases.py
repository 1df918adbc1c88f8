"""Cases of tests/parallel/test_te.py and test_te_fp8.py in one process on a GPU of the mind, with the Transformer
Engine that is installed:

    python -m tests.pretend_gpu.run tests.commands.transformer_engine_cases CASE FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm import platform
from tests.parallel import test_te
from tests.parallel.test_te import EXPERTS, FP8, TE, make_state


def there_and_back(folder: Path) -> None:
    test_te.there_and_back({}, EXPERTS, folder)


def resumed(folder: Path) -> None:
    test_te.resumed(TE, folder)


def kept(folder: Path, sizes: dict | None = None) -> None:
    """Weights that are kept in FP8 are those of the checkpoint, rounded once; their master copies are not rounded."""
    from megatron_dlm.checkpoint.distributed import load, save

    kept_so = dict(**FP8, fp8_param_gather=True, use_distributed_optimizer=True)
    local = test_te.disturbed(make_state({}, sizes or {}, dtype=torch.bfloat16))
    with torch.no_grad():
        for _, parameter in local.named_parameters():
            parameter.mul_(1.4)  # not what another model starts from
    save(local, folder, 0, {}, with_optimizer=False)
    stored = test_te.weights(local)
    state = make_state(kept_so, sizes or {}, with_optimizer=True, dtype=torch.bfloat16)
    load(state, folder, with_optimizer=False)
    for name, weight in test_te.weights(state).items():
        assert _apart(weight, stored[name]) < 0.03, name
    with torch.no_grad():
        squares = sum(
            part.double().square().sum() for group in state.optimizer.param_groups for part in group["params"]
        )
    assert abs(squares / sum(tensor.double().square().sum() for tensor in stored.values()) - 1) < 1e-6


def kept_experts(folder: Path) -> None:
    kept(folder, EXPERTS)


def delayed(folder: Path) -> None:
    """A run whose scales come from earlier steps; called again, one that goes on from its checkpoint and ends alike."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.step import train_step

    layout = dict(
        **FP8, fp8_recipe="delayed", fp8_amax_history_len=4, fp8_amax_compute_algo="max", use_distributed_optimizer=True
    )
    state = make_state(layout, EXPERTS, with_optimizer=True, dtype=torch.bfloat16)
    rows, forward, length = test_te.sft_rows(state)
    step = lambda: train_step(state, rows, forward, length)
    ends = folder / "ends.pt"
    if not ends.exists():
        step(), step()
        save(state, folder, 2, {})
    else:
        load(state, folder)
    done = step()
    found = {"loss": torch.tensor(done.metrics["loss"]), **test_te.weights(state)}
    if ends.exists():
        before = torch.load(ends)
        assert before.keys() == found.keys() and all(torch.equal(before[name], found[name].cpu()) for name in found)
    else:
        torch.save({name: tensor.cpu() for name, tensor in found.items()}, ends)


def delayed_kept(folder: Path) -> None:
    """Weights of such a run that are kept in FP8; called again, the same, read without the optimizer."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.step import train_step

    layout = dict(**FP8, fp8_recipe="delayed", fp8_param_gather=True, use_distributed_optimizer=True)
    state = make_state(layout, dict(init_method_std=0.02), with_optimizer=True, dtype=torch.bfloat16)
    ends = folder / "ends.pt"
    if not ends.exists():
        rows, forward, length = test_te.sft_rows(state)
        train_step(state, rows, forward, length), train_step(state, rows, forward, length)
        save(state, folder, 2, {})
        torch.save({name: tensor.float().cpu() for name, tensor in test_te.weights(state).items()}, ends)
        return
    load(state, folder, with_optimizer=False)
    before = torch.load(ends)
    for name, weight in test_te.weights(state).items():
        assert torch.equal(weight.float().cpu(), before[name]), name


def _apart(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    platform.install()
    plain_rows = test_te.sft_rows

    def sft_rows(state):
        rows, forward, length = plain_rows(state)
        return [row.to(platform.device()) for row in rows], forward, length

    test_te.sft_rows = sft_rows
    cases = {case.__name__: case for case in (there_and_back, resumed, kept, kept_experts, delayed, delayed_kept)}
    cases[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
