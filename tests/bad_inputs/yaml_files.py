"""The file of --config."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad, all_of, binary, folder_at, text

FLAGS = "--config run.yaml"


def _yaml(id: str, content: str, says: str | tuple[str, ...], base: str = "sft") -> Bad:
    return Bad(id, base, FLAGS, says, write=text("run.yaml", content))


ENTRIES = [
    Bad("no such file", "sft", FLAGS, "run.yaml"),
    Bad("a folder as a file", "sft", FLAGS, "run.yaml", write=folder_at("run.yaml")),
    Bad(
        "a YAML file in another encoding", "sft", FLAGS, ("run.yaml", "UTF-8"), write=binary("run.yaml", b"run:\xff\n")
    ),
    Bad("a binary file as YAML", "sft", FLAGS, "run.yaml", write=binary("run.yaml", b"a: \x00\x01\x02")),
    Bad("--config twice", "sft", "--config a.yaml --config b.yaml", "b.yaml", write=text("a.yaml", "")),
    _yaml("a list at the top", "- sft\n- optimizer\n", "run.yaml"),
    _yaml("a word at the top", "optimizer\n", "run.yaml"),
    _yaml("a number at the top", "1\n", "run.yaml"),
    _yaml("no such section", "optimiser: {lr: 1}\n", ("optimiser", "Did you mean optimizer?")),
    _yaml("a section of another command", "rl: {num_rollout: 1}\n", ("rl", "run.yaml")),
    _yaml("a key at the top", "lr: 1\n", ("lr", "optimizer")),
    _yaml("no such key", "optimizer: {learning_rate: 1}\n", ("learning_rate", "optimizer")),
    _yaml("a key with dashes", "optimizer: {weight-decay: 1}\n", ("weight-decay", "Did you mean weight_decay?")),
    _yaml("a key of another section", "optimizer: {train_iters: 1}\n", ("train_iters", "sft.train_iters")),
    _yaml("a key that is no text", "optimizer: {1: 1}\n", ("1", "optimizer")),
    _yaml("a section that is no text", "1: {lr: 1}\n", ("1", "run.yaml")),
    _yaml("a section that is null", "null: {lr: 1}\n", "run.yaml"),
    _yaml("a key that is a list", "? [a, b]\n: 1\n", "run.yaml"),
    _yaml("a section with a value", "optimizer: 3\n", ("optimizer", "3")),
    _yaml("a section with a list", "optimizer:\n  - lr: 1\n", "optimizer"),
    _yaml("a key twice", "optimizer: {lr: 1, lr: 2}\n", ("lr", "twice", "line 1")),
    _yaml("a section twice", "optimizer: {lr: 1}\noptimizer: {lr: 2}\n", ("optimizer", "twice", "line 2")),
    _yaml("a tab", "optimizer:\n\tlr: 1\n", ("run.yaml", "line 2")),
    _yaml("an anchor that is not there", "optimizer: *base\n", ("base", "run.yaml")),
    _yaml("an anchor within itself", "optimizer: &a\n  lr: *a\n", "run.yaml"),
    _yaml("a tag of Python", "optimizer: !!python/object:os.system {}\n", "run.yaml"),
    _yaml("an open bracket", "optimizer: {lr: 1\n", ("run.yaml", "line")),
    _yaml("two documents", "optimizer: {}\n---\noptimizer: {}\n", "run.yaml"),
    _yaml("a number as text", "optimizer: {lr: '1e-4'}\n", ("optimizer.lr", "'1e-4'")),
    _yaml("null for a number", "optimizer: {lr: null}\n", ("optimizer.lr", "null")),
    _yaml(
        "a fraction for a count of steps",
        "sft: {train_iters: 1.5}\n",
        ("sft.train_iters", "1.5"),
        "sft --train-iters 1",
    ),
    _yaml("a number for text", "tokenizer: {prompt_template: 3}\n", ("tokenizer.prompt_template", "3", "quotes")),
    _yaml("a date for text", "checkpoint: {save: 2026-01-01}\n", ("checkpoint.save", "quotes")),
    _yaml("text for a switch", "model: {bf16: 'yes'}\n", ("model.bf16", "'yes'")),
    _yaml("a number for a switch", "model: {bf16: 1}\n", ("model.bf16", "1")),
    _yaml("text for a list", "sft: {data_path: sft.jsonl}\n", ("sft.data_path", "list")),
    _yaml("a list in a list", "sft: {data_path: [[sft.jsonl]]}\n", "sft.data_path"),
    _yaml("an infinite number", "optimizer: {lr: .inf}\n", ("optimizer.lr", "inf")),
    _yaml("numbers as names", "model: {transformer_overrides: {1: 2}}\n", "model.transformer_overrides"),
    Bad(
        "an empty file leaves everything open",
        "sft --config run.yaml",
        "",
        "--tokenizer-model is not set",
        write=text("run.yaml", ""),
    ),
    Bad(
        "a file of comments",
        "evaluate --config run.yaml",
        "",
        "--load is not set",
        write=text("run.yaml", "# nothing\n"),
    ),
    Bad("settings of another run", "evaluate", "--config out/config.yaml", ("parallel", "out/config.yaml")),
    Bad(
        "a value in YAML that a check refuses",
        "sft",
        FLAGS,
        "--adam-eps is 0",
        write=all_of(text("run.yaml", "optimizer: {adam_eps: 0}\n")),
    ),
]
