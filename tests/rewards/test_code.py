"""The judge of programs: which text is the program, verdicts, and the published test sets."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.reward import JudgeConfig
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.tasks import read_task
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.code import program_of
from megatron_dlm.rewards.code_options import CodeOptions
from megatron_dlm.rewards.sandbox import isolation
from megatron_dlm.rewards.scorers import check_verifiers, make_scorer

TEST_DATA = Path(os.environ.get("MEGATRON_DLM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SQUARE = {"question": "q", "test_list": ["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"]}
DOUBLE = {"question": "q", "test_method": "stdio", "test_input": ["2", "3"], "test_output": ["4", "6\n\n"]}


@pytest.fixture(scope="module")
def scorer():
    try:
        isolation.choose("auto")
    except ConfigError:
        pytest.skip("this host offers no isolation")
    options = CodeOptions(time_limit=1.0, response_limit=30.0)
    with make_scorer("code", workers=2, timeout=5.0, code=options) as scorer:
        yield scorer


def _prompt(record):
    task = read_task(record, "here")
    return Prompt("k", (), "q", task.ground_truth, task.verifier, task.metadata)


def _block(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


def test_verdicts(scorer):
    square, double = _prompt(SQUARE), _prompt(DOUBLE)
    verdicts = scorer.score(
        [
            (square, _block("def f(x): return x * x")),
            (square, _block("def f(x): return x + x")),
            (square, _block("def f(x): return x ** 2 if x > 0 else exit()")),
            (square, "I cannot."),
            (double, _block("print(2 * int(input()))")),
            (double, _block("print('4')")),
        ]
    )
    assert verdicts == [
        Verdict(1.0, "3/3 tests", 1.0, ("pass", "pass", "pass")),
        Verdict(0.0, "1/3 tests", 1 / 3, ("pass", "fail", "fail")),
        Verdict(0.0, "2/3 tests", 2 / 3, ("pass", "pass", "exit")),
        Verdict(0.0, "no code", 0.0, ("no code",) * 3),
        Verdict(1.0, "2/2 tests", 1.0, ("pass", "pass")),
        Verdict(0.0, "1/2 tests", 0.5, ("pass", "fail")),
    ]
    assert [verdict.value for verdict in verdicts] == [1.0, 1 / 3, 2 / 3, 0.0, 1.0, 0.5]


def test_a_response_has_a_limit_too():
    try:
        options = CodeOptions(time_limit=0.2, response_limit=2.0, isolation=isolation.choose("auto"))
    except ConfigError:
        pytest.skip("this host offers no isolation")
    record = SQUARE | {"test_list": ["assert f(1) == 1"] * 200}
    with make_scorer("code", workers=1, timeout=5.0, code=options) as scorer:
        (verdict,) = scorer.score([(_prompt(record), _block("while True: pass"))])
    assert verdict.parts == ("timeout",) * 200


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx\n```", "x\n"),
        ("```py\nx\n```\n```python\ny\n```", "y\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx\n```\n```text\noutput\n```", "x\n"),
        ("```python\nx\n```\n```python\ny", "x\n"),
        ("```text\nx\n```", None),
        ("```python\nx", None),
        ("x = 1", None),
        ("```python\n\n```", None),
        ("  ```python\n  x\n  ```", "  x\n"),
    ],
)
def test_the_last_closed_block_is_the_program(text, code):
    assert program_of(text) == code


def test_prefixes_and_completions():
    assert program_of("x\n```", prefix="```python\n") == "x\n"
    assert program_of("    return 1\n", completes="def f():\n") == "def f():\n    return 1\n"
    block = "```python\ndef f(): return math.pi\n```"
    assert program_of(block, completes="import math\ndef f():\n") == "import math\ndef f(): return math.pi\n"


def test_only_prompts_with_tests():
    with pytest.raises(ConfigError, match="--reward code judges only prompts that come with tests"):
        check_verifiers("code", [Prompt("k", (), "", "1", "math")])
    check_verifiers("auto", [_prompt(SQUARE), Prompt("k", (), "", "1", "math")])


def test_without_isolation_nothing_starts(monkeypatch):
    monkeypatch.setattr(isolation, "trouble", lambda level: "no such thing")
    with pytest.raises(ConfigError, match="not run without isolation"):
        make_scorer("code", 1, 5.0)
    options = CodeOptions.of(JudgeConfig())
    with pytest.raises(ConfigError, match="not run without isolation"):
        options.check([_prompt(SQUARE)])
    assert options.check([Prompt("k", (), "", "1", "math")]) is None
    assert "NO isolation" in CodeOptions(isolation="none").check([_prompt(SQUARE)])


def _records(name):
    path = TEST_DATA / name
    if not path.exists():
        pytest.skip(f"no {name} in MEGATRON_DLM_TEST_DATA")
    return [record for _, record in read_jsonl(path)]


def test_the_reference_solutions_of_humaneval(scorer):
    """All pass; with every second problem's solution in a block, and against the next problem's tests: none."""
    records = _records("humaneval.jsonl.gz")
    prompts = [_prompt(record) for record in records]
    for prompt in prompts:  # whole, where a test per assertion would take a minute
        prompt.metadata["tests"] = [record_test(prompt)]
    answers = [
        record["canonical_solution"] if place % 2 else _block(record["prompt"] + record["canonical_solution"])
        for place, record in enumerate(records)
    ]
    verdicts = scorer.score(list(zip(prompts, answers)))
    assert [record["task_id"] for record, verdict in zip(records, verdicts) if verdict.correct != 1.0] == []
    wrong = scorer.score([(prompt, "    return 'wrong'\n") for prompt in prompts[::8]])
    assert sum(verdict.correct for verdict in wrong) == 0


def record_test(prompt):
    """The record's own test, from the tests that were made of it."""
    modules = [ast.parse(test) for test in prompt.metadata["tests"]]
    merged = modules[0]
    check = next(node for node in merged.body if isinstance(node, ast.FunctionDef) and node.name == "check")
    for module in modules[1:]:
        other = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check")
        check.body += other.body
    return ast.unparse(merged)


def test_mbpp(scorer):
    """Programs that look the expected values up pass; with one value changed they fail."""
    prompts, right, wrong = [], [], []
    for record in _records("mbpp.jsonl")[:60]:
        table = [_call(test) for test in record["test_list"]]
        if None in table:
            continue
        prompts.append(_prompt(record))
        right.append(_block(_table(table)))
        wrong.append(_block(_table([*table[:-1], (*table[-1][:2], "'something else'")])))
    assert len(prompts) > 30
    assert [verdict.reason for verdict in scorer.score(list(zip(prompts, right))) if verdict.correct != 1.0] == []
    verdicts = scorer.score(list(zip(prompts[::4], wrong[::4])))
    assert all(verdict.parts[-1] == "fail" and verdict.correct == 0.0 for verdict in verdicts)


def _call(test):
    """(function, arguments, expected value) as source, of an assertion that compares a call with literals."""
    node = ast.parse(test).body[0].test
    if not isinstance(node, ast.Compare) or not isinstance(node.left, ast.Call) or node.left.keywords:
        return None
    try:
        arguments = [ast.literal_eval(argument) for argument in node.left.args]
        expected = ast.literal_eval(node.comparators[0])
    except ValueError:
        return None
    return (ast.unparse(node.left.func), repr(arguments), repr(expected))


def _table(rows):
    rules = "".join(f"    if list(arguments) == {arguments}: return {expected}\n" for _, arguments, expected in rows)
    return f"def {rows[0][0]}(*arguments):\n{rules}"
