from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.evaluation.evaluate import Evaluator, Outcome, summarize, ways_of
from megatron_dlm.evaluation.report import table
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.training.report import Report
from tests.harness import pool
from tests.tiny import Words, disturb, make_session, quiet

ROLLOUT = RolloutConfig(rollout_max_response_len=9, stop_token_ids=list(range(40, 50)), max_running_requests=8)
EVAL = EvalConfig(
    eval_prompt_data=["x"], eval_remasking=["dynamic", "static"], n_samples_per_eval_prompt=2, eval_threshold=0.3
)


class Recorder:
    """A scorer that keeps what it was asked; right if the first word is even."""

    def __init__(self) -> None:
        self.items = []

    def score(self, items):
        self.items += items
        return [Verdict(float(self.right(text)), "") for _, text in items]

    @staticmethod
    def right(text: str) -> bool:
        return bool(text) and int(text.split()[0]) % 2 == 0


def make_prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(f"p{n}", tuple(rng.integers(0, 40, 1 + n).tolist()), f"q{n}", "", "math") for n in range(count)]


def make_evaluator(config: EvalConfig = EVAL, count: int = 7, seed: int = 3):
    from megatron_dlm.rollout.rig import RolloutRig

    session = make_session()
    state = session.train_state(None, 1)
    disturb(state.module, 0)
    prompts, scorer = make_prompts(count), Recorder()
    return (
        Evaluator(RolloutRig.open(session, state, ROLLOUT, 8, 9), scorer, Words(), prompts, config, ROLLOUT, seed),
        scorer,
    )


def test_summary_of_two_responses() -> None:
    found = summarize([Outcome(1.0, 10, 4, 5, False), Outcome(0.0, 20, 6, 5, True)])
    assert found == {
        "accuracy": 0.5,
        "response_len": 15.0,
        "tokens_per_step": 3.0,
        "tokens_per_forward": 3.0,
        "truncated_ratio": 0.5,
        "responses": 2.0,
    }


def test_speeds_are_of_totals_not_means_of_ratios() -> None:
    assert summarize([Outcome(1.0, 1, 1, 1, False), Outcome(1.0, 9, 3, 4, False)])["tokens_per_step"] == 10 / 4


def test_table_has_a_line_for_each_model_and_way() -> None:
    one = {
        f"eval/{way}/{name}": value
        for way, scale in (("dynamic", 1), ("static", 2))
        for name, value in {
            "accuracy": 0.25 * scale,
            "response_len": 10.0,
            "tokens_per_step": 2.5,
            "tokens_per_forward": 2.25,
            "truncated_ratio": 0.125,
        }.items()
    }
    head, line, *rows = table([("before", one), ("after", one)], ["dynamic", "static"]).splitlines()
    assert len(rows) == 4 and set(line) == {"-"} and len(line) == len(head) == len(rows[0])
    assert rows[0].split() == ["before", "dynamic", "25.0%", "10.0", "2.50", "2.25", "12.5%"]
    assert rows[3].split()[:3] == ["after", "static", "50.0%"]


def test_metrics_are_those_of_the_responses() -> None:
    evaluator, scorer = make_evaluator()
    metrics = evaluator(quiet())
    assert len(scorer.items) == 2 * 7 * 2
    for way, items in (("dynamic", scorer.items[:14]), ("static", scorer.items[14:])):
        assert [prompt.key for prompt, _ in items] == [f"p{n}" for n in range(7) for _ in range(2)]
        assert metrics[f"eval/{way}/accuracy"] == np.mean([Recorder.right(text) for _, text in items])
        assert metrics[f"eval/{way}/responses"] == 14
        assert 1 <= metrics[f"eval/{way}/response_len"] <= 9


def samples(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_response_can_be_kept_to_be_read(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    evaluator, scorer = make_evaluator(dataclasses.replace(EVAL, save_eval_samples=str(file)))
    metrics = evaluator(quiet(), 5)
    found = samples(file)
    assert [line["response"] for line in found] == [text for _, text in scorer.items]
    assert [line["unmasking"] for line in found] == ["dynamic"] * 14 + ["static"] * 14
    assert [line["question"] for line in found] == 2 * [f"q{n}" for n in range(7) for _ in range(2)]
    assert {line["step"] for line in found} == {5}
    for way, part in (("dynamic", found[:14]), ("static", found[14:])):
        assert np.mean([line["correct"] for line in part]) == metrics[f"eval/{way}/accuracy"]
        assert np.mean([line["length"] for line in part]) == metrics[f"eval/{way}/response_len"]
        assert all(len(line["step_map"]) == line["length"] for line in part)
    evaluator(quiet(), 10)
    assert [line["step"] for line in samples(file)] == [5] * 28 + [10] * 28


def evaluate_on_replicas(file: str) -> dict[str, float]:
    from megatron_dlm.rollout.rig import RolloutRig
    from tests.parallel.test_tracerl import make_state

    session, state = make_state({})
    rig = RolloutRig.open(session, state, ROLLOUT, 8, 9)
    config = dataclasses.replace(EVAL, save_eval_samples=file)
    report = Report(LoggingConfig(progress_bar=False), session.groups.is_main, {})
    assert rig.num_replicas == 2
    return Evaluator(rig, Recorder(), Words(), make_prompts(7), config, ROLLOUT, 3)(report)


def test_responses_of_all_replicas_are_kept_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    one, other = pool(2).run(evaluate_on_replicas, str(tmp_path / "samples.jsonl"))
    found = samples(tmp_path / "samples.jsonl")
    assert one == other and [line["question"] for line in found] == 2 * [f"q{n}" for n in range(7) for _ in range(2)]
    for way, part in (("dynamic", found[:14]), ("static", found[14:])):
        assert np.mean([line["correct"] for line in part]) == one[f"eval/{way}/accuracy"]
        assert np.mean([line["length"] for line in part]) == one[f"eval/{way}/response_len"]


def test_the_same_evaluation_gives_the_same_numbers() -> None:
    one, _ = make_evaluator()
    other, _ = make_evaluator(dataclasses.replace(EVAL, eval_remasking=["static"]))
    first = one(quiet())
    assert one(quiet()) == first
    assert other(quiet()) == {name: value for name, value in first.items() if "/static/" in name}


def test_another_seed_draws_other_responses() -> None:
    texts = []
    for seed in (3, 4):
        evaluator, scorer = make_evaluator(seed=seed)
        evaluator(quiet())
        texts.append([text for _, text in scorer.items])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("limit, count", [(3, 3), (None, 7), (100, 7)])
def test_the_number_of_prompts_can_be_limited(limit: int | None, count: int) -> None:
    evaluator, scorer = make_evaluator(dataclasses.replace(EVAL, eval_num_prompts=limit, eval_remasking=["dynamic"]))
    assert evaluator(quiet())["eval/dynamic/responses"] == 2 * count
    assert {prompt.key for prompt, _ in scorer.items} == {f"p{n}" for n in range(count)}


def test_settings_reach_the_engine() -> None:
    evaluator, _ = make_evaluator(
        dataclasses.replace(
            EVAL, eval_temperature=0.5, eval_top_k=3, eval_top_p=0.9, eval_max_response_len=5, eval_denoising_steps=2
        )
    )
    sampling = evaluator.sampling("static")
    assert (
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.max_new_tokens,
        sampling.denoising_steps,
    ) == (0.5, 3, 0.9, 5, 2)
    assert (sampling.remasking, sampling.threshold, sampling.block_size, sampling.stop_token_ids) == (
        "static",
        0.3,
        4,
        tuple(range(40, 50)),
    )


def test_ways_of_several_blocks_have_names_of_their_own() -> None:
    one = EvalConfig(eval_remasking=["dynamic", "static"])
    assert ways_of(one) == {"dynamic": ("dynamic", None), "static": ("static", None)}
    assert ways_of(dataclasses.replace(one, eval_block_size=[8])) == {
        "dynamic": ("dynamic", 8),
        "static": ("static", 8),
    }
    assert list(ways_of(dataclasses.replace(one, eval_block_size=[4, 8]))) == [
        "dynamic-block4",
        "static-block4",
        "dynamic-block8",
        "static-block8",
    ]


def test_every_block_is_evaluated_as_if_it_were_the_only_one() -> None:
    both = dataclasses.replace(EVAL, eval_block_size=[2, 4], eval_remasking=["dynamic"])
    together = make_evaluator(both)[0](quiet())
    for block in (2, 4):
        alone = make_evaluator(dataclasses.replace(both, eval_block_size=[block]))[0](quiet())
        for name in ("accuracy", "response_len", "tokens_per_step", "truncated_ratio"):
            assert together[f"eval/dynamic-block{block}/{name}"] == alone[f"eval/dynamic/{name}"]
    assert together["eval/dynamic-block2/tokens_per_step"] != together["eval/dynamic-block4/tokens_per_step"]
    assert not any(name.startswith("eval/dynamic/") for name in together)
