"""Where the time and the memory of a process go: traces, ranges and snapshots, by step, phase and span.

    with profile.profiling(config, folder, rank, say):    # once per run; without it nothing below does anything
        profile.begin_step(10)                            # ten are done: is the eleventh traced?
        with profile.phase("train"):                      # a trace of its own: step11_train_rank0.json.gz
            with profile.span("optimizer"):               # a part of it, by name
                ...

A phase has a file of its own because a viewer that is to show a whole RL step, rollout included, shows nothing. Names
of phases are those of the ledger and of the metrics (config/profile.py). A process has one such profiler, as torch has.

On a GPU, recording begins and ends with the device idle, so phases that are traced are slower than others; the
first one is preceded by an empty recording, which loads what the profiler needs.

Invariants (tests/training/test_profile.py): files appear for the steps, ranks and phases that were asked for, and for
no others; results do not depend on any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from megatron_dlm import platform
from megatron_dlm.config.profile import ProfileConfig

GENERATING = ("rollout", "eval")  # phases that --profile-passes cuts
HISTORY = 200_000  # events of the allocator that a snapshot has at most: some minutes, and a file below 100 MB

_current: Profiler | None = None


@contextmanager
def profiling(
    config: ProfileConfig, folder: str | None, rank: int, say: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Around a run.

    Args:
        folder: for traces.
        say: prints a line.
    """
    global _current
    if not (config.profile or config.nvtx_ranges or config.memory_snapshot_dir):
        yield
        return
    if config.memory_snapshot_dir and platform.is_cuda():
        torch.cuda.memory._record_memory_history(max_entries=HISTORY, stacks="python")
    _current = Profiler(config, None if folder is None else Path(folder), rank)
    _nvtx_of_megatron(config.nvtx_ranges)
    try:
        yield
        if config.profile:
            say(_current.summary())
    finally:
        _current.stop()
        _current = None
        _nvtx_of_megatron(False)
        if config.memory_snapshot_dir and platform.is_cuda():
            torch.cuda.memory._record_memory_history(enabled=None)


def begin_step(done: int) -> None:
    """A training step begins, after `done` others."""
    if _current is not None:
        _current.begin_step(done)


def phase(name: str) -> AbstractContextManager[None]:
    """Around a phase."""
    return nullcontext() if _current is None else _current.phase(name)


def span(name: str) -> AbstractContextManager[None]:
    """Around a part of a phase."""
    return nullcontext() if _current is None else _current.span(name)


def after_pass() -> None:
    """The rollout engine has made a pass."""
    if _current is not None:
        _current.after_pass()


def keep_shortage(table: str) -> str | None:
    """There is not enough memory: write down why, if that was asked for; a sentence that says where.

    Args:
        table: who held what (ledger.py).
    """
    return None if _current is None else _current.keep_shortage(table)


class Profiler:
    """Of one process.

    Attributes:
        traced: numbers of the steps of which traces were written; without steps, one entry for each trace. On ranks
            that write none, those of which others have: phases come alike on all ranks.
        met: phases that came while traces were to be written, asked for or not, in order.
    """

    def __init__(self, config: ProfileConfig, folder: Path | None, rank: int) -> None:
        self.config, self.folder, self.rank = config, folder, rank
        self.first, self.last = getattr(config, "profile_step_start", None), getattr(config, "profile_step_end", None)
        self.phases = getattr(config, "profile_phases", None)
        self.in_time = self.first is None  # a command without steps is traced as a whole
        self.done = 0
        self.traced: list[int] = []
        self.met: dict[str, None] = {}
        self.ranges = config.nvtx_ranges
        self._trace: torch.profiler.profile | None = None
        self._file, self._passes = Path(), None  # of the trace: where it goes, passes that are left
        self._written: tuple[int, dict[str, int]] = (-1, {})  # traces of a step, by name
        self._warm = False

    def begin_step(self, done: int) -> None:
        self.done = done
        if self.first is not None:
            self.in_time = self.first <= done < self.last

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Traces do not nest: a phase within another is a range in its trace."""
        if self.in_time:
            self.met[name] = None
        wanted = self._wants(name) and self._trace is None
        mine = wanted and self.rank in self.config.profile_ranks
        if mine:
            self._start(name)
        try:
            with self.span(name):
                yield
        except BaseException:
            if mine:
                self.stop()
            raise
        if mine:
            self._finish()
        elif wanted:
            self._count()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._trace is None and not self.ranges:
            yield
            return
        with ExitStack() as stack:
            if self._trace is not None:
                stack.enter_context(torch.profiler.record_function(name))
            if self.ranges:
                stack.enter_context(torch.cuda.nvtx.range(name))
            yield

    def after_pass(self) -> None:
        if self._trace is not None and self._passes is not None:
            self._passes -= 1
            if self._passes == 0:
                self._finish()

    def stop(self) -> None:
        """End a recording and forget it."""
        if self._trace is not None:
            self._trace.stop()
            self._trace = None

    def summary(self) -> str:
        if self.traced:
            ranks = " ".join(map(str, self.config.profile_ranks))
            steps = "" if self.first is None else f" of step {self.traced[0]}"
            steps += f" to {self.traced[-1]}" if len(self.traced) > 1 else ""
            return f"Traces{steps} (rank {ranks}) are in {self.folder}; ui.perfetto.dev shows them."
        if self.met or self.first is None:
            came = f"the phases that came were {', '.join(self.met)}" if self.met else "no phase came"
            asked = "" if self.phases is None else f": --profile-phases asks for {' '.join(self.phases)}"
            return f"Nothing was traced{asked}; {came}."
        return (
            f"No step was traced: --profile asks for steps {self.first + 1} to {self.last}, and the last one was "
            f"{self.done + 1}."
        )

    def keep_shortage(self, table: str) -> str | None:
        if self.config.memory_snapshot_dir is None:
            return None
        folder = Path(self.config.memory_snapshot_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written = folder / f"memory_rank{self.rank}.txt"
            written.write_text(table + "\n", encoding="utf-8")
            if not platform.is_cuda():
                return f"This table is in {written}."
            snapshot = written.with_suffix(".pickle")
            torch.cuda.memory._dump_snapshot(str(snapshot))
        except OSError as error:  # what it is about is told anyway
            return f"--memory-snapshot-dir {folder} could not be written to ({error.strerror})."
        return f"This table is in {written}, the allocator's history in {snapshot}; pytorch.org/memory_viz shows it."

    def _wants(self, name: str) -> bool:
        config = self.config
        chosen = self.phases is None or name in self.phases
        return config.profile and self.in_time and chosen

    def _start(self, name: str) -> None:
        if not self._warm:
            self._warm = True
            with _recording():
                pass
        step = "" if self.first is None else f"step{self.done + 1}_"
        self._file = self._free(f"{step}{name}_rank{self.rank}")
        self._passes = self.config.profile_passes if name in GENERATING else None
        platform.synchronize()
        self._trace = _recording()
        self._trace.start()

    def _free(self, name: str) -> Path:
        """A phase that happens several times in a step (rollouts in rounds) has a file for each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._written[0] != self.done:
            self._written = (self.done, {})
        names = self._written[1]
        names[name] = count = names.get(name, 0) + 1
        return self.folder / (name + (f"_{count}" if count > 1 else "") + ".json.gz")

    def _finish(self) -> None:
        if self._trace is None:  # --profile-passes has ended it
            return
        platform.synchronize()
        self._trace.stop()
        trace, self._trace = self._trace, None
        trace.export_chrome_trace(str(self._file))
        self._count()

    def _count(self) -> None:
        """A trace was written, here or on another rank."""
        if self.first is None or self.done + 1 not in self.traced:
            self.traced.append(self.done + 1)


def _recording() -> torch.profiler.profile:
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if platform.is_cuda() else [kinds.CPU])


def _nvtx_of_megatron(on: bool) -> None:
    """megatron-core has ranges of its own in its layers."""
    from megatron.core.utils import configure_nvtx_profiling

    configure_nvtx_profiling(on)
