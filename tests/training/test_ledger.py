from __future__ import annotations

import json

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.platform.memory import DeviceMemory
from megatron_dlm.training.pace import Pace
from tests.tiny import make_session, make_state, quiet, sampler_of

GIB = 2**30


def ledger_of(state=None, **options):
    from megatron_dlm.training.ledger import Ledger, hold_state

    ledger = Ledger(**options)
    if state is not None:
        hold_state(ledger, state)
    return ledger


def held(ledger) -> dict[str, tuple[int, int]]:
    return {name: (one.device, one.host) for name, one in ledger.read().held.items()}


def test_a_storage_counts_once_for_whom_it_was_added_first() -> None:
    ledger = ledger_of()
    weights, other = torch.zeros(10), torch.zeros(3, dtype=torch.float64)
    ledger.add("one", lambda: [weights[2:4], weights.view(2, 5), weights])
    ledger.add("two", lambda: [weights[:1], other, torch.zeros(99, device="meta")])
    ledger.add("three", lambda: 77)
    assert held(ledger) == {"one": (40, 0), "two": (24, 0), "three": (77, 0)}
    assert ledger.read().device == 141
    other.untyped_storage().resize_(0)
    assert held(ledger)["two"] == (0, 0)


@pytest.mark.parametrize("dtype, per_parameter", [(torch.float32, (4, 4, 8)), (torch.bfloat16, (2, 4, 12))])
def test_what_a_state_holds_awake_and_asleep(dtype: torch.dtype, per_parameter: tuple[int, ...]) -> None:
    """In mixed precision: bf16 weights, fp32 gradients, fp32 masters and two moments."""
    from megatron_dlm.training.sleep import sleep, wake
    from tests.sft.test_trainer import SFT, samples

    session = make_session(bf16=dtype == torch.bfloat16)
    state = session.train_state(OptimizerConfig(), 10)
    ledger = ledger_of(state)
    count = sum(parameter.numel() for _, parameter in state.named_parameters())
    weights, gradients, optimizer = (count * size for size in per_parameter)
    moments = 8 * count
    assert held(ledger)["optimizer"] == (optimizer - moments, 0)  # Adam makes its moments in the first step

    from megatron_dlm.sft.trainer import SFTTrainer

    SFTTrainer(session, state, sampler_of(samples(), 5), SFT, seed=5).step()
    steps = 4 * len(list(state.named_parameters()))
    awake = held(ledger)
    assert awake["parameters"][0] == pytest.approx(weights, rel=0.01)  # and the rotary frequencies
    assert awake["gradients"] == (gradients, 0) and awake["optimizer"] == (optimizer + steps, 0)
    sleep(state)
    asleep = held(ledger)
    assert asleep["parameters"] == awake["parameters"]
    assert asleep["gradients"] == (0, 0) and asleep["optimizer"] == (0, optimizer + steps)
    wake(state)
    assert held(ledger) == awake


class Large:
    """As much of a tensor as the ledger looks at, of any size."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = lambda: nbytes
        self.device, self._cdata = platform.device(), id(self)

    def untyped_storage(self):
        return self


def test_metrics_are_the_most_of_a_step(monkeypatch) -> None:
    allocator = iter([DeviceMemory(5 * GIB, 6 * GIB, 7 * GIB), DeviceMemory(2 * GIB, 9 * GIB, 9 * GIB)])
    monkeypatch.setattr("megatron_dlm.training.ledger.memory.usage", lambda: next(allocator))
    said, sizes = [], {"kv cache": 2 * GIB, "optimizer": 0}
    ledger = ledger_of(say=said.append)
    ledger.add("kv cache", lambda: sizes["kv cache"])  # of another process: the allocator does not know of it
    ledger.add("optimizer", lambda: [Large(sizes["optimizer"])])
    ledger.begin_step()
    ledger.mark("rollout")
    sizes.update({"kv cache": 0, "optimizer": 3 * GIB // 2})
    ledger.mark("train")
    assert ledger.metrics() == {
        "memory/kv_cache_gib": 2.0,
        "memory/optimizer_gib": 1.5,
        "memory/host_gib": 0.0,
        "memory/rollout_gib": 2.0,
        "memory/train_gib": 1.5,
        "memory/rollout_peak_gib": 6.0,
        "memory/train_peak_gib": 9.0,
    }
    assert said == [
        "memory after rollout: kv cache 2, others 5, allocated 5, at most 6, reserved 7 GiB",
        "memory after train: optimizer 1.5, others 0.5, allocated 2, at most 9, reserved 9 GiB",
    ]
    ledger.begin_step()
    assert ledger.metrics() == {} and list(ledger.phases) == ["rollout", "train"]


def test_a_shortage_is_told_with_the_phases_once() -> None:
    ledger, size = ledger_of(), [GIB]
    ledger.add("kv cache", lambda: size[0])
    ledger.mark("rollout")
    size[0] = 3 * GIB
    with pytest.raises(torch.OutOfMemoryError) as error:
        with ledger.told_in_shortage(), ledger.told_in_shortage():
            raise torch.OutOfMemoryError("CUDA out of memory.")
    assert error.value.__notes__ == [
        "Device memory of this rank, by phase:\n  after rollout: kv cache 1 GiB\n  now: kv cache 3 GiB"
    ]
    with pytest.raises(ValueError) as other, ledger.told_in_shortage():
        raise ValueError
    assert not hasattr(other.value, "__notes__")


def test_the_command_line_prints_who_held_what_before_it_ends(monkeypatch, capsys) -> None:
    from megatron_dlm import __main__

    def command(argv: list[str]) -> None:
        with ledger_of().told_in_shortage():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("importlib.import_module", lambda name: type("Command", (), {"main": staticmethod(command)}))
    assert __main__.main(["sft"]) == 2
    told = capsys.readouterr().err
    assert told.count("Device memory of this rank, by phase:") == 1
    assert told.index("Device memory") < told.index("ResourceError: There is not enough memory (CUDA out of memory.")


def test_fine_tuning_records_and_prints_it(tmp_path, capsys) -> None:
    import dataclasses

    from megatron_dlm.config.run import TrainingRunConfig
    from tests.sft.test_trainer import SFT, make_trainer

    trainer = make_trainer(dataclasses.replace(SFT, train_iters=3))
    with quiet(metrics_jsonl=str(tmp_path / "metrics.jsonl")) as report:
        logging = LoggingConfig(log_interval=2, log_memory=True)
        trainer.run(report, logging, Pace(TrainingRunConfig(), lambda *call: None))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    count = sum(parameter.numel() for _, parameter in trainer.state.named_parameters())
    assert [record["memory/gradients_gib"] * GIB for record in records] == [4 * count] * 3
    assert all(record["memory/train_gib"] * GIB >= 16 * count for record in records)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory after iteration")]
    assert [line.split(":")[0][-1] for line in lines] == ["2", "3"]


def test_a_frozen_state_holds_its_weights_only() -> None:
    state = make_state(torch.float32)
    frozen = make_session().train_state(None, 1)
    from megatron_dlm.training.ledger import hold_state

    ledger = ledger_of(state)
    hold_state(ledger, frozen, "reference ")
    found = held(ledger)
    assert found["reference parameters"][0] == found["parameters"][0] > 0
    assert found["reference gradients"] == found["reference optimizer"] == (0, 0)
