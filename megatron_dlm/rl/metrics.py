"""What is recorded of an RL step's rollout, and what of a step stands on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dlm.rl.exchange import Graded, by_group


def rollout_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """Of all responses of a step: means, unless the name says otherwise.

    `group_reward_std` is the mean over groups of the population standard deviation of their rewards; `zero_std_ratio`
    the share of groups in which all rewards are equal; `tests_passed_ratio`, there with programs alone, the mean over
    responses of the share of tests that they pass.
    """
    mean = lambda name: float(np.mean([getattr(record, name) for record in graded]))
    total = lambda name: float(sum(getattr(record, name) for record in graded))
    lengths = [record.length for record in graded]
    groups = {key: [record.reward for record in group] for key, group in by_group(graded).items()}
    passed = [record.tests_passed for record in graded if record.tests_passed is not None]
    return ({"rollout/tests_passed_ratio": float(np.mean(passed))} if passed else {}) | {
        "rollout/raw_reward": mean("correct"),
        "rollout/reward": mean("reward"),
        "rollout/group_reward_std": float(np.mean([np.std(rewards) for rewards in groups.values()])),
        "rollout/zero_std_ratio": float(np.mean([min(rewards) == max(rewards) for rewards in groups.values()])),
        "rollout/response_len/mean": mean("length"),
        "rollout/response_len/min": float(min(lengths)),
        "rollout/response_len/p50": float(np.percentile(lengths, 50)),
        "rollout/response_len/p90": float(np.percentile(lengths, 90)),
        "rollout/response_len/max": float(max(lengths)),
        "rollout/tokens": total("length"),
        "rollout/truncated_ratio": mean("truncated"),
        "rollout/overlong_ratio": mean("overlong"),
        "rollout/judge_failed_ratio": mean("judge_failed"),
        "rollout/tokens_per_step": total("length") / total("steps"),
        "rollout/tokens_per_forward": total("length") / total("forwards"),
    }


def staleness_metrics(graded: Sequence[Graded], aborted: int) -> dict[str, float]:
    """How much of a step is older than the step: shares of its responses and of their tokens, and the distance between
    the weights that decided a token and those of the step, in updates of the engine. `aborted`: responses that the step
    stopped.
    """
    tokens = sum(record.length for record in graded)
    return {
        "rollout/aborted": float(aborted),
        "rollout/partial_ratio": float(np.mean([record.continued for record in graded])),
        "rollout/stale_token_ratio": sum(record.stale for record in graded) / tokens,
        "rollout/version_lag_mean": sum(record.version_lag for record in graded) / tokens,
        "rollout/version_lag_max": float(max(record.largest_lag for record in graded)),
    }


def learned_metrics(advantages: Mapping[tuple[str, int], float], responses: int) -> dict[str, float]:
    """Of the responses that are learned from. `responses`: how many there were."""
    metrics = {"rollout/learned_ratio": len(advantages) / responses}
    if advantages:
        values = list(advantages.values())
        metrics |= {
            "rollout/advantages/mean": float(np.mean(values)),
            "rollout/advantages/std": float(np.std(values)),
        }
    return metrics


def console(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """The fields of the log line of an RL step."""
    shown = {
        "accuracy": "rollout/raw_reward",
        "reward": "rollout/reward",
        "response len": "rollout/response_len/mean",
        "overlong": "rollout/overlong_ratio",
        "tokens/step": "rollout/tokens_per_step",
        "learned": "rollout/learned_ratio",
        "loss": "train/loss",
        "k3": "train/k3",
        "clipfrac": "train/pg_clipfrac",
        "entropy": "train/entropy",
        "grad norm": "train/grad_norm",
        "rollout (s)": "perf/rollout_time",
        "train (s)": "perf/train_time",
        "step (s)": "perf/step_time",
    }
    fields: dict[str, float | str] = {name: metrics[key] for name, key in shown.items() if key in metrics}
    return fields | {key: value for key, value in metrics.items() if key.startswith("eval/") and "accuracy" in key}
