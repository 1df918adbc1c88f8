"""A judged response as a person reads it: what was asked, what came, what it was worth, how it was unmasked."""

from __future__ import annotations

from typing import Any

from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rewards.base import Verdict


def sample_record(prompt: Prompt, trace: Trace, text: str, verdict: Verdict, **earned: float | None) -> dict[str, Any]:
    """One JSON object. `step_map` has the denoising step of each response token; `score` and `parts` (a word per test)
    are there where the judge gives them.

    Args:
        text: the response, decoded.
        earned: what else the response was worth, to stand after the verdict.
    """
    length, steps = len(trace.response_ids), trace.num_steps
    said: dict[str, Any] = {} if verdict.score is None else {"score": verdict.score}
    if verdict.parts:
        said["parts"] = list(verdict.parts)
    return {
        "question": prompt.question,
        "ground_truth": prompt.ground_truth,
        "response": text,
        "correct": verdict.correct,
        "reason": verdict.reason,
        **said,
        **earned,
        "finish_reason": trace.finish_reason,
        "length": length,
        "tokens_per_step": round(length / max(steps, 1), 3),
        "step_map": trace.steps.tolist(),
    }
