"""Honest programs: they pass, whatever they print, and every test gets its own word."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_dlm.rewards.sandbox.runner import Check
from megatron_dlm.rewards.sandbox.watch import Limits

TREE = """
class Node:
    def __init__(self, value): self.value, self.left, self.right = value, None, None
    def __eq__(self, other): return self.value == other.value
def depth(node): return 0 if node is None else 1 + max(depth(node.left), depth(node.right))
def leaf(value): return Node(value)
"""

CHECKS = {
    "a number": ("def f(x): return x * x", "assert f(3) == 9"),
    "other assertions": ("def f(x): return x / 3", "assert abs(f(1) - 1 / 3) < 1e-9\nassert not f(0), 'zero'"),
    "all kinds of values": (
        "from collections import *\nfrom fractions import Fraction\nfrom decimal import Decimal\nimport datetime\n"
        "def f(): return [1, (2.5, 'a'), {3: {4}}, None, b'x', 1j, frozenset({5}), range(3),\n"
        " 1 << 99, float('inf'), True,\n"
        " Counter('aab'), OrderedDict(a=1), deque([1]), Fraction(1, 3), Decimal('0.1'), datetime.date(2020, 1, 2)]",
        "from fractions import Fraction\nfrom decimal import Decimal\nimport datetime, collections\n"
        "assert f() == [1, (2.5, 'a'), {3: {4}}, None, b'x', 1j, frozenset({5}), range(3),\n"
        " 1 << 99, float('inf'), True,\n"
        " {'a': 2, 'b': 1}, {'a': 1}, collections.deque([1]), Fraction(1, 3), Decimal('0.1'),\n"
        " datetime.date(2020, 1, 2)]\n"
        "assert [type(x) for x in f()[:4]] == [int, tuple, dict, type(None)] and type(f()[10]) is bool",
    ),
    "a changed argument": ("def f(x): x.append(1)", "a = [2]\nassert f(a) is None\nassert a == [2, 1]"),
    "a changed argument with a name": ("def f(x): x['a'] = 1", "a = {}\nf(x=a)\nassert a == {'a': 1}"),
    "a changed deque": (
        "def f(x): x.append(1)",
        "from collections import deque\na = deque([2])\nf(a)\nassert a == deque([2, 1]) and type(a) is deque",
    ),
    "what an object can be asked": (
        "class T:\n def __init__(self): self.d = {}\n def __contains__(self, k): return k in self.d\n"
        " def __setitem__(self, k, v): self.d[k] = v\n def __delitem__(self, k): del self.d[k]\n"
        " def __bool__(self): return bool(self.d)",
        "t = T()\nassert not t and 'a' not in t\nt['a'] = 1\nassert t and 'a' in t\ndel t['a']\nassert 'a' not in t",
    ),
    "a generator": ("def f(n):\n for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0"),
    "a callback": ("def f(g, x): return g(g(x))", "assert f(lambda y: y + 1, 1) == 3 and f(sorted, [2, 1]) == [1, 2]"),
    "an exception": (
        "def f(x): raise ValueError('no')",
        "try:\n f(1)\nexcept ValueError as error:\n assert 'no' in str(error)\nelse:\n assert False",
    ),
    "objects": (
        TREE,
        "a = Node(1)\na.left = leaf(2)\nassert depth(a) == 2 and a.left.value == 2\nassert leaf(3) == Node(3)\n"
        "assert not leaf(3) == Node(4)",
    ),
    "a module of the program": ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(2), 2 ** 0.5)"),
    "a name of a value": ("LIMIT = 5\ndef f(x): return x + LIMIT", "assert f(1) == 1 + LIMIT"),
    "what is printed": ("def f(x):\n print('x' * 30000)\n return x", "assert f(1) == 1"),
    "a demonstration": ("def f(x): return x\nif __name__ == '__main__':\n input()\n exit(1)", "assert f(1) == 1"),
    "a thread": (
        "import threading\ndef f(x):\n r = []\n t = threading.Thread(target=r.append, args=(x,))\n t.start()\n"
        " t.join()\n return r",
        "assert f(1) == [1]",
    ),
    "a temporary file": (
        "import tempfile\ndef f(x):\n with tempfile.TemporaryFile('w+') as file:\n  file.write(x)\n  file.seek(0)\n"
        "  return file.read()",
        "assert f('a') == 'a'",
    ),
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n x: int\ndef f(p): return P(p.x + 1)",
        "assert f(P(1)) == P(2) and f(P(1)).x == 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_functions(sandbox, level, name):
    if level == "landlock" and name in ("a thread", "a temporary file"):
        pytest.skip("with landlock there are no threads and no files")
    assert sandbox.check(CHECKS[name][0], Check(CHECKS[name][1])) == "pass"


@pytest.mark.parametrize(
    ("program", "test", "word"),
    [
        ("def f(x): return x + 1", "assert f(3) == 9", "fail"),
        ("def f(x): return [x]", "assert f(3) == (3,)", "fail"),
        ("def f(x): return x\ndef abs(x): return 0", "assert abs(f(3) - 9) < 1", "fail"),  # the language's abs
        ("def f(x): return x\nclass math:\n isclose = lambda *a: True", "assert math.isclose(f(3), 9)", "fail"),
        ("def f(x): return float('nan')", "assert f(1) == f(1)", "fail"),
        ("def f(x): return object()", "assert f(1) == f(1)", "fail"),
        ("def f(x): return x", "assert g(1) == 1", "error"),
        ("def f(x: List[int]): return x", "assert f(1) == 1", "error"),  # List is not imported
        ("class T:\n __contains__ = __bool__ = lambda *a: 1\ndef f(x): return T()", "assert 2 in f(1)", "pass"),
        ("class T:\n __bool__ = lambda *a: 'yes'\ndef f(x): return T()", "assert f(1)", "error"),
        ("def f(x): return x", "assert f(1) == 1\nraise SystemExit", "error"),
    ],
)
def test_wrong_functions(sandbox, program, test, word):
    assert sandbox.check(program, Check(test)) == word


def test_the_program_may_define_what_the_language_has(sandbox):
    program = "def sum(a, b): return a * b"
    assert sandbox.check(program, Check("assert sum(3, 4) == 12", entries=("sum",))) == "pass"
    assert sandbox.check(program, Check("assert sum([3, 4]) == 7")) == "pass"


@pytest.mark.parametrize("test", ["assert sum([3, 4]) == 7", "assert list(map(sum, [[1]])) == [1]", "assert sum"])
def test_the_language_does_not_stand_in_for_what_a_program_lacks(sandbox, test):
    assert sandbox.check("def add(a, b): return a + b", Check(test, entries=("sum",))) == "error"


def test_given_code_is_not_the_programs(sandbox):
    given = "def helper(x): return x + 1\ndef f(x): pass"
    program = "def helper(x): return 0\ndef f(x): return helper(x)"
    test = "assert f(3) == helper(3)"
    assert sandbox.check(program, Check(test, given=given, entries=("f",))) == "fail"


def test_input_and_output(sandbox):
    program = "import sys\nn = int(input())\nprint(sum(map(int, sys.stdin.read().split())) + n)"
    outcome = sandbox.run(program, "1\n2 3\n4\n")
    assert (outcome.word, outcome.output) == ("pass", b"10\n")
    assert sandbox.run("if __name__ == '__main__': print(__name__)").output == b"__main__\n"


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("exit()", "pass"),
        ("exit(0)", "pass"),
        ("exit(3)", "exit"),
        ("exit('x')", "exit"),
        ("1 / 0", "error"),
        ("x =", "error"),
    ],
)
def test_ends(sandbox, program, word):
    outcome = sandbox.run(f"print(1)\n{program}" if word != "error" or "=" not in program else program)
    assert outcome.word == word


def test_threads_and_atexit_come_to_their_end(sandbox, level):
    if level == "landlock":
        pytest.skip("with landlock there are no threads")
    thread = "import threading, time\ndef work():\n time.sleep(0.1)\n print(int(input()) + 1)\n"
    thread += "threading.Thread(target=work).start()"
    assert sandbox.run(thread, "41").output == b"42\n"
    assert sandbox.run(thread + "\nraise SystemExit", "41").output == b"42\n"
    bye = "import atexit\natexit.register(print, 'bye')\n"
    for ending, word in (("", "pass"), ("exit()", "pass"), ("exit(1)", "exit"), ("1 / 0", "error")):
        outcome = sandbox.run(bye + ending)
        assert (outcome.word, outcome.output) == (word, b"bye\n")
    sleeps = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert sandbox.run(sleeps).word == "timeout"


def test_annotations_mean_what_they_say(sandbox):
    assert sandbox.run("def f(x: Nothing): pass").word == "error"
    assert sandbox.run("def f(x: int): pass\nprint(f.__annotations__['x'] is int)").output == b"True\n"


def test_sets_have_the_same_order_in_every_sandbox(sandbox):
    """As Python itself orders them with this seed."""
    code = "print(hash('a'), list({'x', 'y', 'z'}))"
    expected = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"})
    assert sandbox.run(code).output == expected


def test_outputs_larger_than_a_pipe(sandbox):
    roomy = Limits(cpu=2.0, output=8 << 20)
    outcome = sandbox.run(
        "import sys\nt = sys.stdin.read()\nsys.stderr.write(t)\nprint(t, end='')", "x" * (4 << 20), roomy
    )
    assert (outcome.word, len(outcome.output), len(outcome.errors)) == ("pass", 4 << 20, 4 << 20)


def test_text_of_all_kinds(sandbox):
    text = "é漢\U0001f600 \udcff"
    assert sandbox.run("print(input())", text[:-1]).output.decode() == text[:-1] + "\n"
    assert sandbox.run("print(ascii(input()))", text).word == "pass"


def test_starting_up_costs_a_program_nothing(sandbox):
    """A program whose whole time is shorter than an interpreter needs to start."""
    assert sandbox.run("print(1)", limits=Limits(cpu=0.02)).word == "pass"
