"""How programs are run, as the settings say, and the pool that runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megatron_dlm.data.code_tasks import CODE
from megatron_dlm.rewards.sandbox import isolation
from megatron_dlm.rewards.sandbox.watch import BUSY
from megatron_dlm.rewards.workers import WorkerPool

if TYPE_CHECKING:
    from megatron_dlm.config.reward import JudgeConfig
    from megatron_dlm.data.prompts import Prompt

_SPARE = 30.0  # seconds that the pool waits longer for a response than its tests may take on the busiest host


@dataclass(frozen=True, slots=True)
class CodeOptions:
    """Attributes:
    isolation: level, or 'auto' for the strongest of this host.
    time_limit: seconds of CPU time per test, where a prompt says nothing.
    response_limit: seconds of wall time for all tests of a response.
    memory: bytes. output: bytes. processes: of one program.
    """

    isolation: str = isolation.AUTO
    time_limit: float = 2.0
    response_limit: float = 60.0
    memory: int = 1 << 30
    output: int = 1 << 20
    processes: int = 8

    @classmethod
    def of(cls, config: JudgeConfig) -> CodeOptions:
        return cls(
            config.code_isolation,
            config.code_time_limit,
            config.code_response_time_limit,
            config.code_memory_limit_mib << 20,
            config.code_max_output_kib << 10,
            config.code_max_processes,
        )

    def pool(self, judge_module: str, workers: int) -> WorkerPool:
        """The workers, with their sandboxes. Raises ConfigError where the host offers no isolation."""
        numbers = asdict(self)
        options = {name: numbers[name] for name in ("memory", "output", "processes", "response_limit")}
        options |= {"level": isolation.choose(self.isolation), "cpu": self.time_limit}
        folder = options["folder"] = tempfile.mkdtemp(prefix="sandboxes-")
        limit = (1 + BUSY) * self.response_limit + _SPARE
        # no limit on a worker's memory: sandboxes that it starts later would inherit it
        return WorkerPool(judge_module, workers, limit, memory_limit=0, options=options, folder=folder)

    def check(self, prompts: Iterable[Prompt], verifier: str = "auto") -> str | None:
        """To be called before anything is generated: which isolation the programs of these prompts will have.

        Args:
            verifier: the one for all prompts, or 'auto'.

        Returns:
            a sentence for the log, or None when no prompt asks for a program.

        Raises:
            ConfigError: they cannot be run on this host.
        """
        if verifier not in ("auto", CODE) or not any(prompt.verifier == CODE for prompt in prompts):
            return None
        return isolation.describe(isolation.choose(self.isolation))
