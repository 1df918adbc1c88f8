"""Records with tests become tasks of programming."""

from __future__ import annotations

import json

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.code_tasks import is_code_task, read_code_task
from megatron_dlm.data.prompts import load_prompts

STDIO = {"question": "q", "test_method": "stdio", "test_input": ["1\n", "2"], "test_output": ["2", "4\n"]}
FUNCTION = {"question": "q", "test_method": "function", "test_list": ["assert f(1) == 2"], "test_time_limit": 1}
MBPP = {"text": "Square.", "code": "", "test_list": ["assert f(1) == 1"], "test_setup_code": "x = 1"}
HUMANEVAL = {
    "prompt": "import math\n\ndef f(x):\n    '''Square.'''\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n    y = 2\n    assert candidate(y) == 4\n"
    "    assert True\n",
}


def test_input_and_output():
    record, found = read_code_task(STDIO, "here")
    assert record == STDIO
    assert found == {"time_limit": None, "method": "stdio", "tests": [["1\n", "2"], ["2", "4\n"]], "prefix": ""}


def test_functions():
    _, found = read_code_task(FUNCTION | {"prefix": "```python\n"}, "here")
    assert (found["method"], found["tests"], found["time_limit"]) == ("function", ["assert f(1) == 2"], 1.0)
    assert (found["prefix"], found["entries"]) == ("```python\n", [])


def test_mbpp():
    record, found = read_code_task(MBPP | {"test_imports": ["import os"]}, "here")
    assert record["question"].startswith("Square.") and "assert f(1) == 1" in record["question"]
    assert found["setup"] == "import os\nx = 1"


def test_humaneval_has_a_test_per_assertion():
    record, found = read_code_task(HUMANEVAL, "here")
    assert record["question"] == found["completes"] == found["given"] == HUMANEVAL["prompt"]
    first, second = found["tests"]
    assert "candidate(1) == 1" in first and "candidate(y)" not in first
    assert "candidate(1)" not in second and "y = 2" in second and second.endswith("check(f)\n")


def test_assertions_in_a_loop_are_one_test():
    test = (
        "def check(candidate):\n    assert candidate(1) == 1\n"
        "    for i in range(9):\n        assert candidate(i) == i * i\n"
    )
    first, second = read_code_task(HUMANEVAL | {"test": test}, "here")[1]["tests"]
    assert "for" not in first and "for" in second and "candidate(1)" not in second


@pytest.mark.parametrize(
    ("tests", "entries"),
    [
        (["assert sum(1, 2) == 3", "assert sum(2, 2) == 4"], ["sum"]),
        (["assert sum(f(1)) == 3"], []),
        (["assert f(1) == sum([1])"], []),
        (["assert 1"], []),
        (["assert sqrt(16) == 4"], ["sqrt"]),
        (["assert date(2020, 1, 2).day == 2"], ["date"]),
        (["assert Counter('aab') == f('aab')"], []),
        (["assert abs(sqrt(2) - 1.414) < 0.001", "assert isclose(sqrt(4), 2.0)"], ["sqrt"]),
        (["assert sum(list(range(3))) == 3"], ["sum"]),
        (["assert abs(-3) == 3"], ["abs"]),
        (["assert sorted(set([2, 1])) == [1, 2]"], []),  # either may be meant
        (["assert sum([1]) == 1", "assert max([1]) == 1"], []),
    ],
)
def test_functions_with_a_name_that_the_language_has(tests, entries):
    assert read_code_task(FUNCTION | {"test_list": tests}, "here")[1]["entries"] == entries


def test_prompts(tmp_path, tiny):
    path = tmp_path / "code.jsonl"
    records = [FUNCTION | {"question": "1+1="}, STDIO | {"question": "2+2="}]
    records.append({"question": "3=", "ground_truth_answer": "3"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts, dropped = load_prompts([str(path)], tiny)
    assert [prompt.verifier for prompt in prompts] == ["code", "code", "math"] and sum(dropped) == 0
    assert prompts[0].metadata["tests"] == FUNCTION["test_list"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (FUNCTION | {"test_method": "pytest"}, "'test_method' is 'pytest'"),
        (FUNCTION | {"test_list": []}, "'test_list' must be a list of at least one text"),
        (FUNCTION | {"test_list": ["assert f("]}, "'test_list' holds what is no Python"),
        (FUNCTION | {"test_list": None}, "'test_list' must be"),
        (STDIO | {"test_output": ["1"]}, "2 texts in 'test_input' and 1 in 'test_output'"),
        (FUNCTION | {"test_time_limit": 0}, "'test_time_limit' is '0'"),
        (FUNCTION | {"test_time_limit": "1"}, "'test_time_limit'"),
        (HUMANEVAL | {"test": "x = 1"}, "defines no function check"),
        (HUMANEVAL | {"test": 5 * "("}, "no Python"),
    ],
)
def test_sentences(record, words):
    assert is_code_task(record)
    with pytest.raises(DataError, match=words):
        read_code_task(record, "file, line 1")
