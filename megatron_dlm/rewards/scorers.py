"""From a verifier's name to a scorer.

One pool of workers per verifier, started when the first of its prompts arrives: a run that mixes files and generated
tasks pays for both, others for one. The pool is the caller's own: with one training process per device, `workers`
counts per process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.workers import WorkerPool

if TYPE_CHECKING:
    from megatron_dlm.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Verifier:
    """A judge, the package it cannot work without, and whether it knows only the prompts that this package
    generated."""

    module: str
    package: str
    distribution: str
    own_prompts: bool = False


VERIFIERS = {
    "math": Verifier("megatron_dlm.rewards.math", "math_verify", "math-verify[antlr4_13_2]"),
    "reasoning_gym": Verifier("megatron_dlm.rewards.reasoning_gym", "reasoning_gym", "reasoning-gym", True),
}
AUTO = "auto"  # each prompt names its own verifier


class PooledScorer:
    """A `Scorer` over worker pools.

        with make_scorer("auto", workers=4, timeout=5.0) as scorer:
            verdicts = scorer.score([(prompt, response_text), ...])

    Between calls nothing is kept but the processes.
    """

    def __init__(self, name: str, workers: int, timeout: float):
        self._name, self._workers, self._timeout = name, workers, timeout
        self._pools: dict[str, WorkerPool] = {}
        if name != AUTO:
            self._pool(name)  # fail before the first rollout, not after

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict per (prompt, text of the response), in the order of the items."""
        indices: dict[str, list[int]] = {}
        for index, (prompt, _) in enumerate(items):
            indices.setdefault(prompt.verifier if self._name == AUTO else self._name, []).append(index)
        verdicts: dict[int, Verdict] = {}
        for verifier, chosen in indices.items():
            work = [(text, prompt.ground_truth, prompt.metadata) for prompt, text in (items[index] for index in chosen)]
            verdicts.update(zip(chosen, self._pool(verifier).judge(work), strict=True))
        return [verdicts[index] for index in range(len(items))]

    def close(self) -> None:
        """End the worker processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> PooledScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pool(self, name: str) -> WorkerPool:
        if name not in self._pools:
            self._pools[name] = WorkerPool(_verifier(name).module, self._workers, self._timeout)
        return self._pools[name]


def make_scorer(name: str, workers: int, timeout: float) -> PooledScorer:
    """A scorer; close it, or use it as a context manager.

    Args:
        name: 'math', 'reasoning_gym', or 'auto', which takes the verifier that each prompt names.
        workers: processes per verifier.
        timeout: seconds of wall time per response.

    Raises:
        ConfigError: an unknown name, no workers or no time.
        DependencyError: the verifier's package is absent.
    """
    if name != AUTO:
        _verifier(name)
    if workers < 1 or timeout <= 0:
        raise ConfigError(
            f"Rewards need at least 1 worker and a positive time limit, not {workers} workers and {timeout} seconds."
        )
    return PooledScorer(name, workers, timeout)


def check_verifiers(name: str, prompts: Iterable[Prompt]) -> None:
    """Refuse, before anything is generated, prompts that the scorer `name` could not judge.

    Raises:
        ConfigError: prompts of files for a verifier that needs what only its generator knows.
        DependencyError: the package of a verifier is absent.
    """
    needed = {prompt.verifier for prompt in prompts}
    for verifier in sorted(needed if name == AUTO else {name}):
        _verifier(verifier)
    if name != AUTO and VERIFIERS[name].own_prompts and needed - {name}:
        raise ConfigError(
            f"--reward {name} judges only prompts that its generator made, and there are others. Use --reward auto, or "
            f"only {name}:NAME sources."
        )


def _verifier(name: str) -> Verifier:
    if name not in VERIFIERS:
        raise ConfigError(f"There is no verifier {name!r}. Use one of {', '.join([AUTO, *VERIFIERS])}.")
    verifier = VERIFIERS[name]
    if importlib.util.find_spec(verifier.package) is None:
        raise DependencyError(
            f"The verifier {name!r} needs the {verifier.package} package, which is not installed. "
            f"Run: pip install '{verifier.distribution}'"
        )
    return verifier
