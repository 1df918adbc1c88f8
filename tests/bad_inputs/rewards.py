"""Judges that are nowhere, and rewards that contradict themselves."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad, edit_line

NOBODY = "--judge-url http://127.0.0.1:9/v1 --judge-model m"  # the port of `discard`, where nobody listens


def _record(id: str, says: str | tuple[str, ...], base: str = "tracerl", **changes: object) -> Bad:
    return Bad(id, base, "", ("prompts.jsonl, line 3", *([says] if isinstance(says, str) else says)),
               write=edit_line("prompts.jsonl", **changes), kind="DataError")  # fmt: skip


ENTRIES = [
    # ---- records
    _record("a verifier with a slip", ("'verifier'", "'maths'", "math"), verifier="maths"),
    _record("a verifier of nobody", "'verifier'", "evaluate", verifier=["math"]),
    _record("options that are text", "'options'", options="A, B"),
    _record("one option", "'options'", "evaluate", options=["1"]),
    _record("an answer that is no option", "'ground_truth_answer'", options=["A", "B"], ground_truth_answer="C"),
    Bad("a record for a model that is nowhere", "evaluate", "", ("'judge'", "--judge-url"),
        write=edit_line("prompts.jsonl", verifier="judge")),
    # ---- a model that judges
    Bad("a judge of no address", "evaluate", "--reward judge", ("--reward judge", "--judge-url")),
    Bad("an address without a model", "evaluate", "--judge-url http://127.0.0.1/v1", "--judge-model"),
    Bad("a model without an address", "tracerl", "--judge-model m", "--judge-url"),
    Bad("an address without a scheme", "evaluate", "--judge-url localhost:80 --judge-model m", "localhost:80"),
    Bad("an address with a key", "evaluate", "--judge-url http://me:x@host/v1 --judge-model m", "JUDGE_API_KEY"),
    Bad("an address that goes too far", "evaluate", "--judge-url http://h/v1/chat/completions --judge-model m", "/v1"),
    Bad("nobody at the address", "evaluate", NOBODY, ("--judge-url http://127.0.0.1:9/v1", "does not answer")),
    Bad("nobody at the address of training", "tracerl", NOBODY, ("--judge-url http://127.0.0.1:9/v1", "m at")),
    Bad("no votes", "evaluate", "--judge-votes 0", "--judge-votes is 0"),
    Bad("no time for a reply", "evaluate", "--judge-timeout 0", "--judge-timeout is 0"),
    Bad("a judge without words", "evaluate", "--judge-max-tokens 0", "--judge-max-tokens is 0"),
    Bad("no request at a time", "evaluate", "--judge-concurrency 0", "--judge-concurrency is 0"),
    Bad("a judge below zero", "evaluate", "--judge-temperature -1", "--judge-temperature is -1"),
    Bad("votes of nobody", "tracerl", "--judge-votes 5", ("--judge-votes 5", "--judge-url")),
    # ---- programs
    Bad("no time for a program", "tracerl", "--code-time-limit 0", "--code-time-limit is 0"),
    Bad("no time for a response", "evaluate", "--code-response-time-limit 7",
        ("--code-response-time-limit 7.0", "--code-time-limit 2.0")),
    Bad("no memory for a program", "evaluate", "--code-memory-limit-mib 10", "--code-memory-limit-mib is 10"),
    Bad("no output of a program", "tracerl", "--code-max-output-kib 0", "--code-max-output-kib is 0"),
    Bad("no process of a program", "tracerl", "--code-max-processes 0", "--code-max-processes is 0"),
    Bad("isolation of another kind", "tracerl", "--code-isolation docker", ("--code-isolation", "'docker'")),
    Bad("programs without tests", "tracerl", "--reward code", ("--reward code", "--reward auto")),
    # ---- other rewards
    Bad("the worth of no form", "tracerl", "--format-reward-coef 0.5", ("-coef 0.5", "--format-reward.")),
    Bad("the size of no penalty", "tracerl", "--overlong-penalty-coef 2", "--overlong-buffer-len"),
    Bad("the range of no speed", "tracerl", "--speed-min-range 2", "--speed-reward-coef"),
    Bad("the length of no parts", "tracerl", "--process-chunk-tokens 9", "--process-reward"),
    Bad("a form that is no expression", "tracerl", "--format-reward '(a'", ("--format-reward", "'(a'")),
    Bad("a form that is worth nothing", "tracerl", "--format-reward boxed --format-reward-coef 0", "-coef is 0"),
    Bad("a penalty for all", "tracerl", "--overlong-buffer-len 8", ("--overlong-buffer-len 8", "less than")),
    Bad("a reward for length", "tracerl", "--short-reward-coef -1", "--short-reward-coef is -1"),
    Bad("a reward for slowness", "tracerl", "--speed-reward-coef -1", "--speed-reward-coef is -1"),
    Bad("parts without a judge", "tracerl", "--process-reward endpoint", ("--process-reward endpoint", "--judge-url")),
    Bad("parts for a file", "tracerl", "--process-reward judge.py", "'judge.py'"),
    Bad("parts for a module that is not there", "tracerl", "--process-reward no.module:f", "no.module:f"),
    Bad("parts without tokens", "tracerl", "--process-chunk-tokens 0", "--process-chunk-tokens is 0"),
]  # fmt: skip
