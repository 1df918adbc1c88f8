from __future__ import annotations

import gc
import hashlib
import time
from pathlib import Path

import pytest
import torch

from megatron_dlm.config.optimizer import OptimizerConfig
from tests.harness import pool
from tests.small_model import LENGTH, Setup, forward_step, make, rows, share
from tests.tiny import disturb, make_session, make_state, sampler_of

STEPS, SAVED = 3, 2
SETUPS = {
    "adam": (1, Setup()),
    "adam bf16": (1, Setup(bf16=True)),
    "sgd": (1, Setup(optimizer="sgd")),
    "sgd momentum bf16": (1, Setup(optimizer="sgd", momentum=0.9, bf16=True)),
    "dp2 distributed": (2, Setup(distributed=True)),
    "dp2 distributed overlap bf16": (2, Setup(distributed=True, overlap=True, bf16=True)),
    "experts overlap bf16": (1, Setup(experts=4, expert_bias=True, overlap=True, bf16=True)),
    "ep2 distributed overlap": (2, Setup(experts=4, ep=2, distributed=True, overlap=True)),
    "tp2 pp2 bf16": (4, Setup(tp=2, pp=2, bf16=True)),
}
WITH_CHECKPOINTS = ("adam", "dp2 distributed overlap bf16", "ep2 distributed overlap", "tp2 pp2 bf16")


def digest(tensors) -> str:
    summary = hashlib.sha256()
    for tensor in tensors:
        summary.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def contents(state) -> tuple:
    """Everything that training goes on from: weights, masters, moments, counters, place in the schedule."""
    state.gather_parameters()
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    held = [
        tensor
        for part in parts
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *part.optimizer.state[parameter].values())
        if torch.is_tensor(tensor)
    ]
    everything = [tensor for chunk in state.unwrapped_chunks() for tensor in (*chunk.parameters(), *chunk.buffers())]
    return digest(everything), digest(held), len(held), state.iteration, state.learning_rate()


def live(state) -> int:
    """Bytes under all tensors that Python knows of, without the copies of a state that sleeps. gloo's threads may hold
    what they have sent for a moment longer: it is counted until nothing changes any more.
    """
    found = [_live(state)]
    while len(found) < 3 or len({*found[-3:]}) > 1:
        time.sleep(0.02)
        found.append(_live(state))
    return found[-1]


def _live(state) -> int:
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    for copy in state.sleep.copy.chunks if state.sleep else []:
        del sizes[copy.untyped_storage()._cdata]
    return sum(sizes.values())


def loss_only(row, model):
    output, loss = forward_step(row, model)
    return output, lambda logits: float(loss(logits)[0])


def state_made(setup: Setup) -> tuple[int, ...]:
    """What is said to come before the first update, what came with it, what then is still to come."""
    from megatron_dlm.training.sleep import optimizer_tensors, sleep, state_to_come, wake
    from megatron_dlm.training.step import train_step

    state = make(setup)
    held = lambda: sum(tensor.nbytes for tensor in optimizer_tensors(state) if tensor.dim())  # without Adam's counters
    said, before = state_to_come(state), held()
    sleep(state)
    sleeping = state_to_come(state)
    wake(state)
    train_step(state, share(state, rows(4)), forward_step, LENGTH)
    return said, held() - before, sleeping, state_to_come(state)


@pytest.mark.parametrize("name", SETUPS)
def test_what_an_optimizer_will_take_is_known_before(name: str) -> None:
    world, setup = SETUPS[name]
    for said, came, sleeping, left in pool(world).run(state_made, setup):
        assert said == came and sleeping == left == 0
        assert (said > 0) == (setup.optimizer == "adam" or setup.momentum > 0)


def take_a_nap(state, setup: Setup) -> None:
    """Sleep, look at what is left, read the weights, and sleep again."""
    from megatron_dlm.training.sleep import asleep, sleep, wake
    from megatron_dlm.training.step import forward_only

    parameters = [parameter for _, parameter in state.named_parameters()]
    state.gather_parameters()
    state.optimizer.zero_grad()
    losses = lambda: forward_only(state, share(state, rows(4, seed=9)), loss_only, LENGTH)
    expected, addresses = losses(), [parameter.data_ptr() for parameter in parameters]
    before = live(state)
    sleep(state)
    count = sum(parameter.numel() for parameter in parameters)
    shared = sum(parameter.numel() for parameter in parameters if getattr(parameter, "allreduce", True))
    if setup.distributed:  # each rank has the state of its half; of experts their only rank has all
        mine = shared // 2 + (count - shared) // (1 if setup.ep > 1 else 2)
    else:
        mine = count
    masters = 4 if setup.bf16 else 0
    moments = 4 * (setup.momentum > 0) if setup.optimizer == "sgd" else 8
    assert before - live(state) >= 0.98 * (4 * count + (masters + moments) * mine)
    assert all(main.untyped_storage().nbytes() == 0 for main in (parameter.main_grad for parameter in parameters))
    sleep(state)
    assert asleep(state)
    state.gather_parameters()
    assert losses() == expected
    assert [parameter.data_ptr() for parameter in parameters] == addresses
    wake(state)
    wake(state)
    assert not asleep(state) and live(state) == before and not state.sleep.copy.chunks
    assert all(not parameter.main_grad.any() for parameter in parameters)
    sleep(state)


def train(setup: Setup, folder: Path | None, naps: bool) -> tuple:
    """Train, and with a folder save amid it, load that at the end and go on. Everything there is after each part."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.sleep import sleep, wake
    from megatron_dlm.training.step import train_step

    state, results = make(setup), []
    if naps:
        sleep(state)  # there is no state of Adam's yet
    for step in range(STEPS):
        results.append(train_step(state, share(state, rows(4, seed=step)), forward_step, LENGTH))
        if naps and step == 0:
            take_a_nap(state, setup)
        elif naps:
            sleep(state)
        if folder is not None and step + 1 == SAVED:
            save(state, folder, SAVED, {})
    wake(state)
    found = [contents(state)]
    if folder is None:
        return results, found
    if naps:
        sleep(state)
    load(state, folder, SAVED)
    found.append(contents(state))
    if naps:
        sleep(state)  # with tensors that came from a file
    results.append(train_step(state, share(state, rows(4, seed=0)), forward_step, LENGTH))
    found.append(contents(state))
    return results, found


@pytest.mark.parametrize("name", SETUPS)
def test_training_with_naps_is_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    world, setup = SETUPS[name]
    plain, napping = (
        pool(world).run(train, setup, tmp_path / str(naps) if name in WITH_CHECKPOINTS else None, naps)
        for naps in (False, True)
    )
    assert napping == plain
    iterations = [STEPS, SAVED, SAVED + 1] if name in WITH_CHECKPOINTS else [STEPS]
    for _, found in plain:
        assert [state[3] for state in found] == iterations and len({state[0] for state in found}) == len(found)


def small_state(**options):
    return make_state(torch.float32, optimizer=OptimizerConfig(**options))


def test_an_update_under_way_is_not_interrupted() -> None:
    from megatron_dlm.training.sleep import asleep, sleep

    state = small_state()
    state.chunks[0].bucket_groups[0].grad_reduce_handle = object()
    with pytest.raises(RuntimeError, match="in the middle of an update"):
        sleep(state)
    assert not asleep(state) and all(parameter.main_grad.numel() for _, parameter in state.named_parameters())


def test_who_moves_a_parameter_is_told() -> None:
    from megatron_dlm.training.sleep import sleep, wake

    state = small_state()
    sleep(state)
    name, parameter = list(state.named_parameters())[3]
    parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match=f"moved while their TrainState slept: {name}$"):
        wake(state)


def test_without_room_it_sleeps_on() -> None:
    """Waking fails half-way, then there is room."""
    from megatron_dlm.training.sleep import asleep, optimizer_tensors, sleep, wake

    class Full:
        calls = 0

        def resize_(self, nbytes: int) -> None:
            self.calls += 1
            if self.calls == 1:
                raise torch.OutOfMemoryError("no room")

    state = make_state(torch.bfloat16, optimizer=OptimizerConfig())
    before = digest(optimizer_tensors(state))
    sleep(state)
    state.sleep.freed.append((full := Full(), 4))
    with pytest.raises(torch.OutOfMemoryError):
        wake(state)
    assert asleep(state) and full.calls == 2
    assert all(parameter.main_grad.untyped_storage().nbytes() == 0 for _, parameter in state.named_parameters())
    state.sleep.freed.pop()
    wake(state)
    assert digest(optimizer_tensors(state)) == before


def test_a_frozen_model_has_nothing_to_give() -> None:
    from megatron_dlm.training.sleep import sleep, wake

    state = make_session().train_state(None, 1)
    before = live(state)
    sleep(state)
    assert live(state) == before
    wake(state)


@pytest.mark.parametrize("chunk", [7, 100, 2**26])
def test_host_copies_hold_storages_of_any_size(chunk: int, monkeypatch) -> None:
    from megatron_dlm.training import sleep

    monkeypatch.setattr(sleep, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    copy = sleep.HostCopy()
    for sizes in [(3, 50, 1), (200, 8), (5,), (60, 60)]:  # it is used again for more and for less
        tensors = [torch.rand(size, generator=generator) for size in sizes]
        storages, before = [tensor.untyped_storage() for tensor in tensors], [tensor.clone() for tensor in tensors]
        copy.save(storages)
        for tensor in tensors:
            tensor.zero_()
        copy.restore(storages)
        assert all(torch.equal(one, other) for one, other in zip(tensors, before))
        assert all(len(piece) <= chunk for piece in copy.chunks)


@pytest.mark.parametrize(
    "changes", [{}, {"bf16": True}, {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}]
)
def test_fine_tuning_with_naps_is_the_same(changes: dict) -> None:
    from megatron_dlm.sft.trainer import SFTTrainer
    from megatron_dlm.training.sleep import sleep, wake
    from tests.sft.test_trainer import SFT, samples

    found = []
    for naps in (False, True):
        session = make_session(**changes)
        state = session.train_state(OptimizerConfig(lr=1e-2), 10)
        disturb(state.module, 0)
        state.optimizer.reload_model_params()
        trainer = SFTTrainer(session, state, sampler_of(samples(), 5), SFT, seed=5)
        results = []
        for _ in range(3):
            results.append(trainer.step()[0])
            if naps:
                sleep(state)
        wake(state)
        found.append((results, contents(state)))
    assert found[0] == found[1]
