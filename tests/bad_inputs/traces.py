"""`trace`: its settings, the responses that it reads, and outputs that it does not go on with."""

from __future__ import annotations

import json

from tests.bad_inputs.bench import Bad, all_of, line, text

BEGUN = text("traced.jsonl.unfinished", '{"old": 1}\n')
NOTE = {"version": 1, "lines": 1, "bytes": 11, "totals": {}, "contents": {}, "flags": {}}

ENTRIES = [
    Bad("nothing to trace with", "trace", "", "--load is not set", "--load"),
    Bad("nothing to trace", "trace", "", "--input is not set", "--input"),
    Bad("input as output", "trace", "--output ./sft.jsonl", ("--output ./sft.jsonl", "--input")),
    Bad("no tokens in a step", "trace", "--tokens-per-step 0", "--tokens-per-step is 0"),
    Bad("more tokens in a step than in a block", "trace", "--tokens-per-step 5", ("--tokens-per-step 5", "1 to 4")),
    Bad("blocks of full attention", "trace", "--trace-block-size 4", ("--trace-block-size 4", "--block-size")),
    Bad("a context of several processes", "trace", "--context-parallel-size 2", "no flag --context-parallel-size"),
    Bad("an output that is complete", "trace", "--output scored.jsonl", "--output scored.jsonl is there already"),
    Bad(
        "an output begun with something else",
        "trace",
        "",
        "--output traced.jsonl was begun with other contents of the file of --input",
        write=all_of(BEGUN, text("traced.jsonl.unfinished.json", json.dumps(NOTE))),
    ),
    Bad("an output begun by nobody", "trace", "", "does not say how far", write=BEGUN, kind="DataError"),
    Bad("rows too short for a text", "trace", "--max-tokens-per-row 4", "--max-tokens-per-row 4", kind="DataError"),
    Bad(
        "a line without a response",
        "trace",
        "",
        ("sft.jsonl, line 3", "'response' is missing"),
        write=line("sft.jsonl", {"question": "1"}),
        kind="DataError",
    ),
    Bad(
        "a text longer than positions",
        "trace",
        "",
        ("sft.jsonl, line 3", "128 positions"),
        write=line("sft.jsonl", {"question": "1", "response": "x " * 200}),
        kind="DataError",
    ),
    Bad("a canvas for a model with blocks", "trace", "--canvas-length 64", "--canvas-length 64"),
]
