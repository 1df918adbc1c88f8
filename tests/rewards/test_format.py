"""Forms of responses, by name and by the user's expression."""

from __future__ import annotations

import pytest

from megatron_dlm.config import reward as settings
from megatron_dlm.rewards.format import FORMS, FormatScorer


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [
        ("boxed", "so \\boxed{2}", 1),
        ("boxed", "so \\boxed{}", 0),
        ("boxed", "so \\boxed{2", 0),
        ("boxed", "2", 0),
        ("boxed", "\\boxed{" * 5000, 0),
        ("think", "<think>hm</think>2", 1),
        ("think", " <think>\nhm\n</think>\n2\n", 1),
        ("think", "hm</think>2", 1),
        ("think", "</think>2", 1),
        ("think", "<think>hm</think>", 0),
        ("think", "<think>hm</think> \n", 0),
        ("think", "<think>hm", 0),
        ("think", "2", 0),
        ("think", "", 0),
        ("think", "a<think>hm</think>2", 0),
        ("think", "<think><think>hm</think>2", 0),
        ("think", "<think>hm</think>2</think>3", 0),
        ("think", "<think>hm</think>2<think>", 0),
        ("think", "<think>" * 5000, 0),
    ],
)
def test_named_forms(form, text, value):
    assert FormatScorer(form, 1, 1.0).score([text]) == [value]


def test_the_settings_know_all_names():
    assert tuple(FORMS) == settings.FORMS


def test_an_expression_matches_the_whole_text_and_may_not_take_for_ever():
    scorer = FormatScorer(r"(a+)+b?|x.*y", 1, 1.0)
    texts = ["aaab", " aab\n", "aabc", "x\n\ny", "x\ny z", "a" * 60 + "c", "ab"]
    try:
        assert scorer.score(texts) == [1, 1, 0, 1, 0, 0, 1]  # the last but one would take years
        assert scorer.score([]) == []
    finally:
        scorer.close()
