"""Records whose responses are programs, and the tests that judge them.

    test_method "function", test_list [assertions], and if wanted prefix, test_setup_code, test_imports
    test_method "stdio", test_input [texts], test_output [texts]
    prompt, test (which defines check(candidate)), entry_point         as HumanEval has it
    text or prompt, test_list, test_setup_code, test_imports           as MBPP has it

and `test_time_limit`, seconds of CPU time per test. The last two become questions: their text goes through the prompt
template and the chat template. For MBPP the tests are put below it, because only they say how the function is called.

The metadata of such a prompt (rewards/code.py reads it): `method`; `tests`, assertions or pairs of input and output;
`setup`, code before each test; `given`, trusted code that defines names which tests use; `entries`, names that mean the
program's own functions even where the language has them; `prefix`; `completes`; `time_limit`, or None.
"""

from __future__ import annotations

import ast
import builtins
import math

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import text_field

CODE = "code"  # the verifier's name
STDIO, FUNCTION = "stdio", "function"
_MARKS = ("test_method", "test_list")
# What tests use by its bare name because the programs that they were written for had imported it, and from where.
COMMON = {
    "Counter": "collections", "defaultdict": "collections", "OrderedDict": "collections", "deque": "collections",
    "Decimal": "decimal", "Fraction": "fractions", "datetime": "datetime", "date": "datetime",
    "timedelta": "datetime", "sqrt": "math", "isclose": "math", "pi": "math", "inf": "math",
    "List": "typing", "Dict": "typing", "Optional": "typing", "Tuple": "typing", "Any": "typing", "Union": "typing",
}  # fmt: skip
_COMPARE = (  # around what a test is about, to compare its result
    "abs", "all", "any", "bool", "dict", "float", "frozenset", "int", "isclose", "isinstance", "len", "list", "repr",
    "round", "set", "sorted", "str", "tuple", "type",
)  # fmt: skip
_TESTS_FOLLOW = "\nYour code should pass these tests:\n\n"


def is_code_task(record: dict) -> bool:
    """Whether a record is one of these, complete or not."""
    return any(mark in record for mark in _MARKS) or ("test" in record and "entry_point" in record)


def read_code_task(record: dict, where: str) -> tuple[dict, dict]:
    """What a record asks for.

    Returns:
        (the record whose prompt is to be read, the metadata for its judge).

    Raises:
        DataError: tests are missing or malformed.
    """
    if "test_method" not in record and "test" in record:
        record, found = _humaneval(record, where)
    elif record.get("test_method", FUNCTION) == FUNCTION:
        record, found = _functions(record, where)
    elif record["test_method"] == STDIO:
        found = _stdio(record, where)
    else:
        raise DataError(
            f'{where}: \'test_method\' is {str(record["test_method"])[:40]!r}. Use "{FUNCTION}" or "{STDIO}".'
        )
    return record, {"time_limit": _time_limit(record, where), **found}


def _functions(record: dict, where: str) -> tuple[dict, dict]:
    tests = _texts(record, "test_list", where)
    for test in tests:
        _parsed(test, where, "test_list")
    setup = _optional_text(record, "test_setup_code", where)
    if record.get("test_imports"):
        setup = "\n".join([*_texts(record, "test_imports", where), setup])
    _parsed(setup, where, "test_setup_code")
    if "question" not in record and "test_method" not in record:  # MBPP
        field = "text" if "text" in record else "prompt"
        record = {**record, "question": text_field(record, field, where) + _TESTS_FOLLOW + "\n".join(tests) + "\n"}
    return record, {
        "method": FUNCTION,
        "tests": tests,
        "setup": setup,
        "entries": _entries(tests),
        "prefix": _optional_text(record, "prefix", where),
    }


def _humaneval(record: dict, where: str) -> tuple[dict, dict]:
    prompt, entry = text_field(record, "prompt", where), text_field(record, "entry_point", where)
    tree = _parsed(text_field(record, "test", where), where, "test")
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None:
        raise DataError(f"{where}: 'test' defines no function check(candidate). Add it.")
    return {**record, "question": prompt}, {
        "method": FUNCTION,
        "tests": [f"{test}\ncheck({entry})\n" for test in _one_assertion_each(tree, check)],
        "setup": "",
        "given": prompt if _is_program(prompt) else "",
        "entries": [entry],
        "completes": prompt,
    }


def _one_assertion_each(tree: ast.Module, check: ast.FunctionDef) -> list[str]:
    """The test module once per assertion at the top of `check`, without the others; once more, without any of them, if
    there are assertions further inside."""
    own = [node for node in check.body if isinstance(node, ast.Assert) and not _always_true(node)]
    rest = [node for node in check.body if not isinstance(node, ast.Assert)]
    inner = any(isinstance(node, ast.Assert) for part in rest for node in ast.walk(part))
    if len(own) + inner < 2:
        return [ast.unparse(tree)]
    body, tests = check.body, []
    for chosen in [*own, *([None] if inner else [])]:
        check.body = [node for node in body if node is chosen or node in rest]
        tests.append(ast.unparse(tree))
    check.body = body
    if inner and own:  # loops are run once, not with every assertion, where nothing depends on them
        loops = [node for node in rest if any(isinstance(part, ast.Assert) for part in ast.walk(node))]
        if all(isinstance(node, ast.For | ast.While) for node in loops):
            for place, chosen in enumerate(own):
                check.body = [node for node in body if node is chosen or (node in rest and node not in loops)]
                tests[place] = ast.unparse(tree)
            check.body = body
    return tests


def _always_true(node: ast.Assert) -> bool:
    return isinstance(node.test, ast.Constant) and bool(node.test.value)


def _stdio(record: dict, where: str) -> dict:
    given, expected = _texts(record, "test_input", where), _texts(record, "test_output", where)
    if len(given) != len(expected):
        raise DataError(
            f"{where}: {len(given)} texts in 'test_input' and {len(expected)} in 'test_output'. Give one output for "
            "each input."
        )
    return {
        "method": STDIO,
        "tests": [list(pair) for pair in zip(given, expected)],
        "prefix": _optional_text(record, "prefix", where),
    }


def _entries(tests: list[str]) -> list[str]:
    """A function that all tests are about and whose name is known without it, such as `sum` or `sqrt`; else nothing."""
    called = [_calls(ast.parse(test)) for test in tests]
    if any(not hasattr(builtins, name) and name not in COMMON for names in called for name in names):
        return []
    subjects = {_subject(names) for names in called}
    return sorted(subjects) if len(subjects) == 1 and None not in subjects else []


def _subject(called: list[str]) -> str | None:
    """Which of the names that an assertion calls, the outer ones first, it is about: abs(sqrt(2) - 1.4) about sqrt."""
    others = [name for name in called if name not in _COMPARE]
    return others[0] if others else called[0] if len(set(called)) == 1 else None


def _calls(tree: ast.AST) -> list[str]:
    return [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


def _texts(record: dict, field: str, where: str) -> list[str]:
    """A field that must be a non-empty list of texts; a single text counts as a list of one."""
    held = record.get(field)
    held = [held] if isinstance(held, str) else held
    if not isinstance(held, list) or not held or not all(isinstance(text, str) for text in held):
        raise DataError(f"{where}: '{field}' must be a list of at least one text. Add it, or correct it.")
    return held


def _optional_text(record: dict, field: str, where: str) -> str:
    return text_field(record, field, where, null="") if field in record else ""


def _parsed(text: str, where: str, field: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{where}: '{field}' holds what is no Python: {text.strip()[:60]!r} ({error.__class__.__name__}). "
            "Correct it."
        ) from None


def _is_program(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _time_limit(record: dict, where: str) -> float | None:
    limit = record.get("test_time_limit")
    if limit is None:
        return None
    if type(limit) not in (int, float) or not math.isfinite(limit) or limit <= 0:
        raise DataError(
            f"{where}: 'test_time_limit' is {str(limit)[:40]!r}, not a number of seconds above 0. Correct it, or take "
            "it out."
        )
    return float(limit)
