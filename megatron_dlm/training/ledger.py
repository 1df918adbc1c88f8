"""A ledger of memory: who holds how many bytes, on the device and in host memory, phase by phase.

    ledger = Ledger()
    hold_state(ledger, state)                          # parameters, gradients, optimizer
    ledger.add("kv cache", lambda: [engine.cache.storage])
    with ledger.told_in_shortage():                    # an OutOfMemoryError then tells who held what, in which phase
        ...
        ledger.mark("rollout")

A storage is counted once, whatever number of tensors lie over it, for the holder that was added first: an engine that
reads the training parameters holds nothing of its own. What the allocator says (CUDA only) goes beyond the holders by
activations, workspaces and whatever nobody accounts for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.platform import memory
from megatron_dlm.platform.memory import DeviceMemory
from megatron_dlm.training import profile, sleep
from megatron_dlm.training.state import TrainState

GIB = 2**30

Holding = Callable[[], "Iterable[Tensor] | int"]
"""What a holder has: tensors, or the bytes of another process that works for this one on the same device."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one holder. `apart`: how many of those on the device are another process's."""

    device: int
    host: int
    apart: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All holders at one moment, by name, and what the allocator says then (None on a CPU)."""

    held: Mapping[str, Held]
    allocator: DeviceMemory | None

    @property
    def device(self) -> int:
        return sum(held.device for held in self.held.values())

    @property
    def host(self) -> int:
        return sum(held.host for held in self.held.values())

    def __str__(self) -> str:
        """One line, in GiB."""
        shown = [
            f"{name} {_gib(held.device)}" + (f" (+ {_gib(held.host)} in host memory)" if held.host else "")
            for name, held in self.held.items()
            if held.device or held.host
        ]
        if self.allocator is not None:
            one = self.allocator
            accounted = self.device - sum(held.apart for held in self.held.values())
            shown.append(f"others {_gib(one.allocated - accounted)}")
            shown.append(f"allocated {_gib(one.allocated)}, at most {_gib(one.peak)}, reserved {_gib(one.reserved)}")
        return ", ".join(shown) + " GiB"


@dataclass(slots=True)
class Ledger:
    """Attributes: say: is told a line at each mark; None: nobody is. phases: the latest snapshot of each phase."""

    say: Callable[[str], None] | None = None
    phases: dict[str, Snapshot] = field(default_factory=dict)
    _holders: list[tuple[str, Holding, Callable[[], Iterable[Tensor]]]] = field(default_factory=list)
    _step: dict[str, Snapshot] = field(default_factory=dict)

    def add(self, name: str, holding: Holding, in_host_memory: Callable[[], Iterable[Tensor]] = tuple) -> None:
        """
        Args:
            holding: asked at each reading. Tensors elsewhere than on the device count as host memory.
            in_host_memory: tensors that do so even where the host is the device.
        """
        self._holders.append((name, holding, in_host_memory))

    def read(self) -> Snapshot:
        """Who holds what, now."""
        seen: set[int] = set()
        held = {}
        for name, holding, in_host_memory in self._holders:
            holds = holding()
            if isinstance(holds, int):
                here, there, apart = holds, 0, holds
            else:
                here, there, apart = *_bytes(holds, seen), 0
            held[name] = Held(here, there + sum(_bytes(in_host_memory(), seen)), apart)
        return Snapshot(held, memory.usage())

    def begin_step(self) -> None:
        """`metrics` speaks of what is marked from now on."""
        self._step.clear()
        memory.restart_peak()

    def mark(self, phase: str) -> None:
        """The end of a phase: who holds what, and the most that the allocator held since the last mark."""
        self.phases[phase] = self._step[phase] = snapshot = self.read()
        memory.restart_peak()
        if self.say is not None:
            self.say(f"memory after {phase}: {snapshot}")

    def metrics(self) -> dict[str, float]:
        """Of this rank's phases since `begin_step`, in GiB: of each holder the most on the device; the most in host
        memory; of each phase all holders together, and on CUDA the allocator's peak.
        """
        metrics: dict[str, float] = {}
        for phase, snapshot in self._step.items():
            for name, held in snapshot.held.items():
                key = f"memory/{name.replace(' ', '_')}_gib"
                metrics[key] = max(metrics.get(key, 0.0), held.device / GIB)
            metrics["memory/host_gib"] = max(metrics.get("memory/host_gib", 0.0), snapshot.host / GIB)
            metrics[f"memory/{phase}_gib"] = snapshot.device / GIB
            if snapshot.allocator is not None:
                metrics[f"memory/{phase}_peak_gib"] = snapshot.allocator.peak / GIB
        return metrics

    @contextmanager
    def told_in_shortage(self) -> Iterator[None]:
        """Within it an OutOfMemoryError takes a table of the phases along, as a note, and says where more of it was
        written (profile.py); __main__.py prints both."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not getattr(error, "__notes__", None):
                error.add_note(table := self.table())
                if (where := profile.keep_shortage(table)) is not None:
                    error.add_note(where)
            raise

    def table(self) -> str:
        """A line per phase, and one about now."""
        lines = [f"  after {phase}: {snapshot}" for phase, snapshot in self.phases.items()]
        return "\n".join(["Device memory of this rank, by phase:", *lines, f"  now: {self.read()}"])


def hold_state(ledger: Ledger, state: TrainState, prefix: str = "") -> None:
    """Add what a TrainState holds. `prefix` tells several states apart."""
    ledger.add(f"{prefix}parameters", partial(sleep.parameter_tensors, state))
    ledger.add(f"{prefix}gradients", partial(sleep.gradient_tensors, state))
    ledger.add(f"{prefix}optimizer", partial(sleep.optimizer_tensors, state), partial(sleep.host_tensors, state))


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> tuple[int, int]:
    """Bytes of the storages that are not in `seen` yet, on the device and elsewhere."""
    here = there = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata in seen or storage.device.type == "meta":
            continue
        seen.add(storage._cdata)
        if storage.device.type == platform.device().type:
            here += storage.nbytes()
        else:
            there += storage.nbytes()
    return here, there


def _gib(count: int) -> str:
    return f"{count / GIB:.3g}"
