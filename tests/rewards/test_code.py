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
from megatron_dlm.rewards import code, code_options
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.code import program_of
from megatron_dlm.rewards.code_options import CodeOptions
from megatron_dlm.rewards.sandbox import isolation
from megatron_dlm.rewards.sandbox.watch import Limits
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
        ("  ```python\n  x\n  ```", "x\n"),
        ("1. So:\n   ```python\n   if x:\n     y\n\n z\n   ```", "if x:\n  y\n\nz\n"),
        ("```python\n    x\n    ```", "    x\n"),
        ("\t```python\n\tx\n\t```", "x\n"),
    ],
)
def test_the_last_closed_block_is_the_program(text, code):
    assert program_of(text) == code


def test_prefixes_and_completions():
    assert program_of("x\n```", prefix="```python\n") == "x\n"
    assert program_of("    return 1\n", completes="def f():\n") == "def f():\n    return 1\n"
    block = "```python\ndef f(): return math.pi\n```"
    assert program_of(block, completes="import math\ndef f():\n") == "import math\ndef f(): return math.pi\n"


HELPED = "def add(x, y):\n    return x + y\n\ndef f(x):\n    '''Twice x.'''\n"


@pytest.mark.parametrize(
    "answer",
    [
        "def f(x):\n    return add(x, x)\n",
        "    return add(x, x)\n",
        "from __future__ import annotations\ndef f(x: Number) -> Number:\n    return add(x, x)\n",
    ],
)
def test_what_a_prompt_defines_is_there_for_its_answer(answer):
    names = {}
    exec(compile(program_of(f"```python\n{answer}```", completes=HELPED), "", "exec", dont_inherit=True), names)
    assert names["f"](4) == 8


class Fake:
    """A sandbox whose programs take the seconds that their tests say, on a clock of their own."""

    def __init__(self, cpu=2.0):
        self.limits, self.now, self.given = Limits(cpu), 0.0, []

    def monotonic(self):
        return self.now

    def check(self, program, check, limits):
        self.given.append(limits)
        self.now += min(float(check.test), limits.wall)
        return "timeout" if float(check.test) > limits.wall else "pass"


def _judged_by(monkeypatch, fake, tests, response_limit, **metadata):
    monkeypatch.setattr(code, "_sandbox", fake)
    monkeypatch.setattr(code, "_response_limit", response_limit)
    monkeypatch.setattr(code, "time", fake)
    return code.judge(_block("x"), "", {"method": "function", "tests": tests, **metadata}).parts


@pytest.mark.parametrize("time_limit", [None, 15.0, 19.7, 30.0, 1000.0])
def test_a_prompt_may_ask_for_more_time_than_there_is(monkeypatch, time_limit):
    fake = Fake()
    assert _judged_by(monkeypatch, fake, ["1", "1"], 60.0, time_limit=time_limit) == ("pass", "pass")
    assert [limits.wall for limits in fake.given] == pytest.approx(
        [min(60.0 - past, 3 * (time_limit or 2.0) + 1) for past in (0, 1)]
    )


def test_tests_get_the_time_that_is_left(monkeypatch):
    fake = Fake()
    assert _judged_by(monkeypatch, fake, ["6"] * 4, 20.5) == ("pass",) * 3 + ("timeout",)
    assert sum(limits.wall for limits in fake.given[-1:]) <= 8.5 and fake.now <= 20.5
    assert _judged_by(monkeypatch, Fake(), ["0.5", "0.5"], 0.9) == ("pass", "timeout")  # the first runs in any case


def test_who_hangs_twice_is_not_run_again(monkeypatch):
    fake = Fake()
    assert _judged_by(monkeypatch, fake, ["1", "99", "1", "99", "1"], 1000.0) == (
        "pass", "timeout", "pass", "timeout", "timeout"
    )  # fmt: skip
    assert len(fake.given) == 4


def test_the_language_does_not_answer_for_a_program(scorer):
    """Tests of functions that exist without the program that was to define them."""
    tests = ["assert sqrt(16) == 4", "assert sum([1, 2]) == 3", "assert date(2020, 1, 2).day == 2"]
    prompts = [_prompt({"question": "q", "test_list": [test]}) for test in tests]
    verdicts = scorer.score([(prompt, _block("x = 1")) for prompt in prompts])
    assert [verdict.parts for verdict in verdicts] == [("error",)] * 3
    own = "def sqrt(x): return x ** 0.5\ndef sum(x): return x[0] + x[1]\nfrom datetime import date"
    assert all(verdict.correct for verdict in scorer.score([(prompt, _block(own)) for prompt in prompts[:2]]))


def test_without_isolation_nothing_travels_between_tests_or_stays():
    leave = "import os, tempfile\nprint(os.listdir('.'), os.path.samefile(tempfile.gettempdir(), '.'))\nopen('f', 'w')"
    metadata = {"method": "stdio", "tests": [["", "[] True"]] * 2}
    with CodeOptions(isolation="none").pool("megatron_dlm.rewards.code", 1) as pool:
        folder = Path(pool._folder)
        (verdict,) = pool.judge([(_block(leave), "", metadata)])
        assert verdict.parts == ("pass", "pass") and len(os.listdir(folder)) == 2  # one for each side
    assert not folder.exists()


def test_workers_leave_their_programs_the_memory(monkeypatch):
    """A sandbox that is started again inherits what its worker is limited to."""
    made = {}
    monkeypatch.setattr(code_options, "WorkerPool", lambda *_, **settings: made.update(settings))
    CodeOptions(isolation="none", memory=8 << 30).pool("m", 1)
    os.rmdir(made["folder"])
    assert made["memory_limit"] == 0 and made["options"]["memory"] == 8 << 30


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
