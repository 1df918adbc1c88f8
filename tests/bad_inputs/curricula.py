"""Curricula that cannot run: found before the first stage does anything."""

from __future__ import annotations

import json

from tests.bad_inputs.bench import Bad, all_of, folder_at, text

LEARNS = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "block_size": 4},
    "tokenizer": {"tokenizer_model": "tokenizer"},
    "sft": {"data_path": ["sft.jsonl"], "train_iters": 2, "global_batch_size": 4},
}
EVALUATES = {"name": "check", "command": "evaluate", "eval": {"eval_prompt_data": ["prompts.jsonl"]}}
ABSENT = LEARNS["sft"] | {"data_path": ["no.jsonl"]}
UNTIL = {"metric": "eval/static/accuracy", "at_least": 1}
RL = {"prompt_data": ["prompts.jsonl"], "num_rollout": 1, "num_steps_per_rollout": 1}
RUN = "curriculum --config c.yaml"


def stages(*more: dict, **changes: object):
    """A valid first stage with changes of its sections, and further stages; JSON is YAML."""
    first = {"name": "warm", "command": "sft", **LEARNS, **changes}
    return text("c.yaml", json.dumps({"save": "new", "stages": [first, *more]}))


def bad(id: str, write, *says: str, flags: str = "", kind: str = "ConfigError") -> Bad:
    return Bad(id, RUN, flags, says, write=write, kind=kind)


ENTRIES = [
    Bad("a curriculum without a file", "curriculum", says="--config is not set"),
    bad("a curriculum that is nowhere", None, "c.yaml cannot be read"),
    bad("a curriculum without stages", text("c.yaml", "save: new\n"), "lists no stages"),
    bad("a flag of another command", stages(), "no flag --train-iters", flags="--train-iters 3"),
    bad("status and dry run", stages(), "--status and --dry-run", flags="--status --dry-run"),
    bad("again from the unknown", stages(), "--redo-from warn", "Did you mean warm?", flags="--redo-from warn"),
    bad("again what was not begun", stages(), "has not begun", flags="--redo-from warm"),
    bad("a stage of an unknown command", stages(command="stf"), "stf", "Did you mean sft?"),
    bad("a stage with an unknown key", stages(optimizer={"rate": 1}), "stage warm of c.yaml has no key rate"),
    bad("a stage that its command refuses", stages(optimizer={"lr": -1.0}), "Stage warm:", "--lr is -1"),
    bad("a later stage that its command refuses", stages({"name": "rl", "command": "tracerl"}), "Stage rl:"),
    bad(
        "a stage whose layout does not fit",
        stages(parallel={"tensor_model_parallel_size": 3}),
        "Stage warm:",
        "--tensor-model-parallel-size 3",
    ),
    bad("a stage without its data", stages(sft=ABSENT), "no.jsonl", kind="DataError"),
    bad(
        "a metric that fine-tuning has not",
        stages(until={"metric": "eval/dynamic/accuracy", "at_least": 1}),
        "sft does not record",
    ),
    bad(
        "a metric that is not measured",
        stages(EVALUATES | {"gate": {"metric": "eval/dynamc/accuracy", "at_least": 1}}),
        "eval/dynamc/accuracy",
        "Did you mean",
    ),
    bad(
        "a metric of an evaluation that never is",
        stages({"name": "rl", "command": "tracerl", "rl": RL, "until": UNTIL}),
        "eval_interval is not set",
    ),
    bad(
        "a damaged record",
        all_of(stages(), lambda world: (world / "new").mkdir(), text("new/curriculum.json", "{")),
        "no record",
        kind="CheckpointError",
    ),
    bad("a curriculum kept in a file", all_of(stages(), text("new", "")), "save new cannot be written to"),
    bad("a curriculum that is a folder", folder_at("c.yaml"), "c.yaml cannot be read"),
    Bad("an exit metric without a value", "sft", "--exit-metric train/loss", "--exit-metric-at-least"),
    Bad("a value of no exit metric", "tracerl", "--exit-metric-at-least 1", "--exit-metric"),
    Bad("pass rates for epochs", "tracerl", "--pass-rates rl", "--prompt-sampling difficulty"),
    Bad(
        "pass rates of a run without",
        "tracerl",
        "--pass-rates rl --prompt-sampling difficulty",
        "holds no pass rates",
        kind="CheckpointError",
    ),
]
