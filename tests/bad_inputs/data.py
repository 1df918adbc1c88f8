"""Data files and prompt sources."""

from __future__ import annotations

import gzip
import json

from tests.bad_inputs.bench import Bad, binary, cut_gzip, folder_at, line, remove, text

GOOD = json.dumps({"question": "1+1=", "response": "2", "ground_truth_answer": "2"}) + "\n"
MASK = "<|MASK|>"


def _sft(id: str, record: object, says: str | tuple[str, ...]) -> Bad:
    """A bad third line of sft.jsonl."""
    return Bad(
        id,
        "sft",
        "",
        ("sft.jsonl, line 3", *([says] if isinstance(says, str) else says)),
        write=line("sft.jsonl", record),
        kind="DataError",
    )


def _prompts(id: str, record: object, says: str | tuple[str, ...], base: str = "tracerl") -> Bad:
    return Bad(
        id,
        base,
        "",
        ("prompts.jsonl, line 3", *([says] if isinstance(says, str) else says)),
        write=line("prompts.jsonl", record),
        kind="DataError",
    )


def _file(id: str, write, says: str | tuple[str, ...], base: str = "sft", flags: str = "") -> Bad:
    return Bad(id, base, flags, says, write=write, kind="DataError")


def _generator(id: str, source: str, says: str | tuple[str, ...], base: str = "tracerl") -> Bad:
    """Generated tasks as prompts."""
    flag = "--prompt-data" if base == "tracerl" else "--eval-prompt-data"
    return Bad(id, base, f"{flag} '{source}'", says, kind="DataError")


ENTRIES = [
    # ---- lines
    _sft("a line that is not JSON", "{'question': '1+1='}", "not JSON"),
    _sft("a line that is cut", '{"question": "1+1="', "not JSON"),
    _sft("a line that is a list", [1, 2], "list"),
    _sft("a line that is null", "null", "null"),
    _sft("a number with too many digits", "9" * 5000, "thousands of digits"),
    _sft("a line nested too deeply", "[" * 100000, "nested"),
    _sft("two objects on a line", GOOD.strip() * 2, "not JSON"),
    _sft("no response", {"question": "1+1="}, "'response' is missing"),
    _sft("no question", {"response": "2"}, "no prompt"),
    _sft("a response that is null", {"question": "1", "response": None}, ("'response'", "null")),
    _sft("a response that is a list", {"question": "1", "response": ["2"]}, ("'response'", "list")),
    _sft("a question that is an object", {"question": {"a": 1}, "response": "2"}, ("'question'", "object")),
    _sft("a question that is true", {"question": True, "response": "2"}, ("'question'", "boolean")),
    _sft("a mask in the response", {"question": "1", "response": MASK}, ("response", "mask")),
    _sft("a mask in the question", {"question": MASK, "response": "1"}, ("prompt", "mask")),
    _sft("half a surrogate pair", '{"question": "\\ud800", "response": "1"}', "\\ud800"),
    _sft("messages that are text", {"messages": "hello"}, "'messages'"),
    _sft("messages without an answer", {"messages": [{"role": "user", "content": "1"}]}, "'messages'"),
    _sft(
        "a message without content", {"messages": [{"role": "user"}, {"role": "assistant", "content": "1"}]}, "entry 0"
    ),
    _prompts("no answer to a prompt", {"question": "1+1="}, "'ground_truth_answer' is missing"),
    _prompts("an answer that is a list", {"question": "1", "ground_truth_answer": ["1"]}, ("list",)),
    _prompts("a mask in a prompt", {"question": MASK, "ground_truth_answer": "1"}, "mask"),
    _prompts("a mask in a prompt to evaluate", {"question": MASK, "ground_truth_answer": "1"}, "mask", "evaluate"),
    _prompts("a prompt that is empty", {"question": "", "ground_truth_answer": "1"}, "no tokens"),
    _prompts("a prompt to evaluate that is empty", {"prompt": "", "ground_truth_answer": "1"}, "no tokens", "evaluate"),
    # ---- files
    _file("no such data file", remove("sft.jsonl"), ("sft.jsonl", "does not exist")),
    _file("a folder as data", folder_at("sft.jsonl"), ("sft.jsonl", "folder")),
    _file("a file as a folder", remove("nothing"), "sft.jsonl/x.jsonl", flags="--data-path sft.jsonl/x.jsonl"),
    Bad("an empty path of data", "sft", "--data-path ''", "--data-path is empty"),
    _file("a name that is too long", remove("nothing"), "xxx", flags="--data-path " + "x" * 300),
    _file("an empty data file", text("sft.jsonl", ""), ("sft.jsonl", "no samples")),
    _file("blank lines only", text("sft.jsonl", "\n \n\t\n"), ("sft.jsonl", "no samples")),
    _file(
        "the second file is bad",
        text("two.jsonl", GOOD + "{\n"),
        "two.jsonl, line 2",
        flags="--data-path sft.jsonl two.jsonl",
    ),
    _file("not UTF-8", binary("sft.jsonl", GOOD.encode() + b'{"question": "\xe9"}\n'), ("sft.jsonl, line 2", "UTF-8")),
    _file("UTF-16", binary("sft.jsonl", GOOD.encode("utf-16")), ("sft.jsonl", "UTF-8")),
    _file(
        "a gzip file that is cut", cut_gzip("sft.jsonl.gz", GOOD * 50), "sft.jsonl.gz", flags="--data-path sft.jsonl.gz"
    ),
    _file("gzip only by name", text("sft.jsonl.gz", GOOD), "sft.jsonl.gz", flags="--data-path sft.jsonl.gz"),
    _file(
        "gzip with a damaged middle",
        binary("sft.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:30] + b"\0" * 40),
        "sft.jsonl.gz",
        flags="--data-path sft.jsonl.gz",
    ),
    _file("gzip without the name", binary("sft.jsonl", gzip.compress(GOOD.encode())), ("sft.jsonl", "UTF-8")),
    _file("one JSON list as a file", text("sft.jsonl", "[" + GOOD.strip() + "]\n"), ("sft.jsonl, line 1", "list")),
    _file("pretty-printed JSON", text("sft.jsonl", json.dumps(json.loads(GOOD), indent=1)), ("sft.jsonl, line 1",)),
    _file("a CSV file", text("sft.jsonl", "question,response\n1,2\n"), ("sft.jsonl, line 1", "not JSON")),
    _file("no such prompts", remove("prompts.jsonl"), ("prompts.jsonl", "does not exist"), "tracerl"),
    _file("no such prompts to evaluate", remove("prompts.jsonl"), ("prompts.jsonl", "does not exist"), "evaluate"),
    _file(
        "prompts without any answer",
        text("prompts.jsonl", '{"question": "1", "ground_truth_answer": null}\n'),
        "prompts.jsonl",
        "tracerl",
    ),
    _file(
        "held-out prompts that are missing",
        remove("nothing"),
        "nowhere.jsonl",
        "tracerl",
        "--eval-prompt-data nowhere.jsonl --eval-interval 1",
    ),
    # ---- generators
    _generator("no such generator", "reasoning_gym:sums", "'sums'"),
    _generator("a generator with a slip", "reasoning_gym:chain_sums", ("'chain_sums'", "chain_sum")),
    _generator("a generator without a name", "reasoning_gym:", "''"),
    _generator("no such option", "reasoning_gym:chain_sum?sise=10", ("'chain_sum'", "sise")),
    _generator("an option of the wrong type", "reasoning_gym:chain_sum?size=many", ("size", "'many'")),
    _generator("an option of the wrong size", "reasoning_gym:chain_sum?size=0", "'chain_sum'"),
    _generator("a fraction of a task", "reasoning_gym:chain_sum?size=2.5", ("size", "2.5"), "evaluate"),
    _generator("a seed that is text", "reasoning_gym:chain_sum?size=5&seed=x", ("seed", "'x'")),
    _generator(
        "options that contradict", "reasoning_gym:chain_sum?size=5&min_terms=6&max_terms=2", "'chain_sum'", "evaluate"
    ),
    Bad("generated tasks for a judge of files", "tracerl", "--reward reasoning_gym", "--reward reasoning_gym"),
]
