"""How records say what they are judged by."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.prompts import load_prompts
from megatron_dlm.data.tasks import FILE_VERIFIERS, read_task
from megatron_dlm.rewards.multiple_choice import judge
from megatron_dlm.rewards.scorers import VERIFIERS
from tests.data.test_prompts import _file

CHOICE = {"question": "1+1=", "options": ["1", 2, "three"], "ground_truth_answer": "B"}


@pytest.mark.parametrize("name", FILE_VERIFIERS)
def test_a_record_names_its_verifier(name):
    task = read_task({"question": "1+1=", "ground_truth_answer": 2, "verifier": name}, "here")
    assert (task.verifier, task.ground_truth, task.metadata) == (name, "2", {})
    assert name in VERIFIERS and not VERIFIERS[name].own_prompts


def test_mathematics_is_what_is_meant_otherwise():
    record = {"question": "1+1=", "ground_truth_answer": None}
    assert read_task(record, "here") == (record, "", "math", {})


def test_options_stand_below_the_question(tmp_path, tiny):
    (prompt,), _ = load_prompts([_file(tmp_path, CHOICE)], tiny, "Q {question} ?")
    assert prompt.question == "1+1=\nA. 1\nB. 2\nC. three"
    assert tiny.decode(list(prompt.token_ids)) == "Q 1+1=\nA. 1\nB. 2\nC. three ?"
    assert (prompt.verifier, prompt.ground_truth) == ("multiple_choice", "B")
    assert judge("\\boxed{2}", prompt.ground_truth, prompt.metadata).correct == 1.0
    assert judge("\\boxed{C}", prompt.ground_truth, prompt.metadata).correct == 0.0


def test_a_finished_prompt_stays_as_it_is():
    record = CHOICE | {"prompt": "which?"}
    del record["question"]
    assert read_task(record, "here").record["prompt"] == "which?"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verifier": "maths"}, "'verifier' is 'maths'.*Did you mean math"),
        ({"verifier": "reasoning_gym"}, "no such judge"),
        ({"verifier": 3}, "'verifier' is '3'"),
        ({"options": "1, 2"}, "list of 2 to 26"),
        ({"options": ["1"]}, "list of 2 to 26"),
        ({"options": ["1", None]}, "option 1: the field 'options' is a JSON null"),
        ({"options": ["1", " 1"]}, "same text twice"),
        ({"options": ["1", " "]}, "without any"),
        ({"options": ["3", "3."]}, "same text twice"),
        ({"options": ["4", "$4$"]}, "same text twice"),
        ({"options": ["a", "\\text{A}"]}, "same text twice"),
        ({"ground_truth_answer": "D"}, "'D', which is no option.*from A to C"),
    ],
)
def test_sentences(changes, words):
    with pytest.raises(DataError, match=f"here.*{words}"):
        read_task(CHOICE | changes, "here")


@pytest.mark.parametrize("truth", ["B", "b", "2", "THREE ", None])
def test_an_answer_is_a_letter_or_a_text(truth):
    assert read_task(CHOICE | {"ground_truth_answer": truth}, "here").verifier == "multiple_choice"
