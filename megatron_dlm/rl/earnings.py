"""What responses earn besides their verdicts, where that takes their text: their form, and what a judge says of their
parts.

    earnings = open_earnings(config, tokenizer, rl, limit, endpoint)
    forms    = earnings.forms(texts)                     # 1.0 or 0.0 each, before the records are gathered
    records  = earnings.complete(records, judged)        # shaped rewards, scores of parts: the same on every rank

Parts are judged only of groups that are learned from (bands.py), for a judging model costs more than the responses, on
the rank that holds the trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rewards.endpoint import Endpoint
from megatron_dlm.rewards.format import FormatScorer
from megatron_dlm.rewards.process import ProcessJudge, Scores, Solution, make_process_judge
from megatron_dlm.rl.bands import usable
from megatron_dlm.rl.exchange import Graded, by_group
from megatron_dlm.rl.process import chunk_ends, scatter
from megatron_dlm.rl.rewards import chunk_rewards, shaped_rewards
from megatron_dlm.rl.samples import Judged

TokenRewards = Callable[[Graded, Trace, np.ndarray, np.ndarray], np.ndarray]
"""(record, trace, steps [R] of the trajectory, learned tokens bool [R]) -> rewards of tokens, float64 [R]."""


class Earnings:
    """One per run.

    Args:
        config: --format-reward and its neighbours.
        tokenizer: decodes the parts of responses.
        rl: which groups are learned from.
        limit: longest response allowed, tokens.
        form: judges forms; None without --format-reward.
        judge: of parts; None without --process-reward.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer,
        rl: RLConfig,
        limit: int,
        form: FormatScorer | None = None,
        judge: ProcessJudge | None = None,
    ) -> None:
        self.config, self.tokenizer, self.rl, self.limit = config, tokenizer, rl, limit
        self.form, self.judge = form, judge

    def forms(self, texts: Sequence[str]) -> list[float]:
        """1.0 for each text that has the form of --format-reward, and 0.0 for any other."""
        return [0.0] * len(texts) if self.form is None else self.form.score(texts)

    def complete(self, graded: Sequence[Graded], judged: Sequence[Judged]) -> list[Graded]:
        """Records with their rewards and, where parts are judged, the scores of these. Collective over all ranks.

        Args:
            graded: all records of all ranks. judged: the responses that this rank judged, in any order.
        """
        rewards = {
            (record.group, record.sample): float(reward)
            for group in by_group(graded).values()
            for record, reward in zip(group, shaped_rewards(group, self.config, self.limit))
        }
        records = [dataclasses.replace(one, reward=rewards[one.group, one.sample]) for one in graded]
        if self.judge is None:
            return records
        scores: dict[tuple[str, int], Scores] = {}
        for part in gather_objects(self._judge_parts(records, judged)):
            scores |= part
        nothing = Scores(())
        found = [scores.get((one.group, one.sample), nothing) for one in records]
        return [
            dataclasses.replace(one, chunks=own.scores, chunks_failed=own.failed) for one, own in zip(records, found)
        ]

    def _judge_parts(self, records: Sequence[Graded], judged: Sequence[Judged]) -> dict[tuple[str, int], Scores]:
        """Scores of the parts of this rank's responses, of the groups that are learned from."""
        right = {
            (record.group, record.sample): record.accuracy > 0
            for group in by_group(records).values()
            if usable(group, self.rl, self.config)
            for record in group
        }
        keys = [(one.trace.prompt_key, one.trace.sample) for one in judged]
        chosen = [(key, one) for key, one in zip(keys, judged) if key in right]
        solutions = [Solution(one.prompt, one.text, self._parts(one), right[key]) for key, one in chosen]
        return dict(zip([key for key, _ in chosen], self.judge.judge(solutions)))

    def _parts(self, one: Judged) -> tuple[str, ...]:
        """The texts of the response up to the end of each chunk; the last is the whole."""
        ids = one.trace.response_ids.tolist()
        ends = chunk_ends(
            len(ids), self.config.process_chunk_tokens, len(one.trace.prompt_ids), chunk_grid(self.config, one.trace)
        )
        return tuple(self.tokenizer.decode(ids[:end], skip_special_tokens=True) for end in ends)

    def token_rewards(self, graded: Sequence[Graded]) -> TokenRewards | None:
        """What rewards the tokens of responses whose parts were judged; None without --process-reward.

        Args:
            graded: complete records, of all responses of their groups.
        """
        if self.judge is None:
            return None
        rewards = chunk_rewards(graded)
        return lambda record, trace, steps, trainable: token_rewards(
            self.config, rewards[record.group, record.sample], trace, steps, trainable
        )

    def metrics(self, graded: Sequence[Graded]) -> dict[str, float]:
        """Of complete records: how many have the form, and what was said of their parts."""
        metrics = {}
        if self.form is not None:
            metrics["rollout/format_ratio"] = float(np.mean([one.form for one in graded]))
        if self.judge is not None:
            scores = [score for one in graded for score in one.chunks]
            metrics["rollout/process_parts"] = float(len(scores))
            if scores:
                metrics["rollout/process_reward"] = float(np.mean(scores))
                metrics["rollout/process_failed_ratio"] = sum(one.chunks_failed for one in graded) / len(scores)
        return metrics

    def close(self) -> None:
        """End the worker processes."""
        if self.form is not None:
            self.form.close()

    def __enter__(self) -> Earnings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_earnings(
    config: RewardConfig, tokenizer, rl: RLConfig, limit: int, endpoint: Endpoint | None = None
) -> Earnings:
    """What the settings reward besides verdicts; close it, or use it as a context manager.

    Args:
        limit: longest response allowed, tokens.
        endpoint: of --judge-url, if that is given.

    Raises:
        ConfigError: the function of --process-reward is not there.
    """
    judge = make_process_judge(config, endpoint)
    form = None
    if config.format_reward is not None:
        form = FormatScorer(config.format_reward, config.reward_workers, config.reward_timeout)
    return Earnings(config, tokenizer, rl, limit, form, judge)


def chunk_grid(config: RewardConfig, trace: Trace) -> int:
    """The `block_size` that `chunk_ends` is given for a trace."""
    return trace.sampling.block_size if config.process_chunk_grid == "block" else 1


def token_rewards(
    config: RewardConfig, rewards: Sequence[float], trace: Trace, steps: np.ndarray, trainable: np.ndarray
) -> np.ndarray:
    """Rewards of the tokens of one response from those of its chunks (rewards.chunk_rewards).

    Args:
        steps: int [R], the steps of the trajectory as advantages count them (shrunk, if steps are merged).
        trainable: bool [R], the tokens that are learned.

    Returns:
        float64 [R].
    """
    ends = chunk_ends(
        len(trace.response_ids), config.process_chunk_tokens, len(trace.prompt_ids), chunk_grid(config, trace)
    )
    return scatter(rewards, ends, steps, trace.sampling.block_size, trainable)
