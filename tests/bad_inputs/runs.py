"""Runs that begin and cannot go on, the ends of runs, and mistakes of jobs of several processes."""

from __future__ import annotations

import json

from tests.bad_inputs.bench import Bad, folder_at, line, remove, text, truncate

SAME = json.dumps({"question": "1+1=", "ground_truth_answer": "2"}) + "\n"
TWO = "--tensor-model-parallel-size 2"

PLAN = "plan --model-preset tiny --vocab-size 300 --global-batch-size 4 "

ENTRIES = [
    Bad(
        "a loss that is no number",
        "sft",
        "--lr 1e30 --train-iters 9",
        ("loss", "--lr"),
        kind="TrainingError",
        late=True,
    ),
    Bad(
        "nothing to learn from",
        "tracerl",
        "--max-empty-steps 1 --num-rollout 3",
        ("No group", "--min-group-accuracy"),
        kind="TrainingError",
        late=True,
    ),
    Bad("a model beyond all memory", "sft", f"--ffn-hidden-size {2**40}", "not enough memory", kind="ResourceError"),
    Bad(
        "metrics onto a full disk",
        "sft",
        "--metrics-jsonl /dev/full",
        "No room is left",
        kind="ResourceError",
        late=True,
    ),
    Bad("steps of a trace that nobody wrote", "sft", "--sft-objective trace", "megatron-dlm trace", kind="DataError"),
    Bad("masks of an objective without", "sft", "--sft-objective ar --mask-draws 2", ("--mask-draws", "elbo")),
    Bad("no such objective", "sft", "--sft-objective mlm", ("--sft-objective", "semi_ar")),
    Bad("slices of a model with blocks", "sft", "--sft-objective semi_ar --slice-size 8", "--slice-size 8"),
    Bad("a schedule without steps", "sft", "--block-size-schedule 1 4", ("'1'", "1:200 4:200 32")),
    Bad("a schedule that ends elsewhere", "sft", "--block-size-schedule 1:5 2", ("blocks of 2", "--block-size")),
    Bad("ten processes for rows", "sft", "--num-workers 10", "--num-workers is 10"),
    Bad("no empty step", "tracerl", "--max-empty-steps 0", "--max-empty-steps is 0"),
    Bad("an end of every zeroth step", "sft", "--exit-interval 0", "--exit-interval is 0"),
    Bad("a plan for unknown hardware", PLAN + "--plan-hardware z80", says="z80"),
    Bad("a plan for a file that is not there", PLAN + "--plan-hardware z80.yaml", says="z80.yaml"),
    Bad("a plan for no process", PLAN + "--plan-world-size 0", says="--plan-world-size is 0"),
    Bad(
        "a plan for processes that do not divide",
        PLAN + "--plan-world-size 3 --tensor-model-parallel-size 2",
        says=("3 processes", "--tensor-model-parallel-size 2"),
    ),
    Bad("a plan of steps without tokens", PLAN + "--plan-tokens-per-step 0", says="--plan-tokens-per-step is 0"),
    Bad("a plan that leaves no memory", PLAN + "--plan-reserve-gib 1000", says="--plan-reserve-gib 1000"),
    Bad("a plan written nowhere", PLAN + "--plan-json tokenizer", says="--plan-json tokenizer"),
    Bad("a dry run of no process", "sft", "--dry-run --dry-run-world-size 0", "--dry-run-world-size is 0"),
    Bad("processes of no dry run", "tracerl", "--dry-run-world-size 2", "--dry-run-world-size needs --dry-run"),
    Bad(
        "a dry run of a layout that cannot be", "tracerl", "--dry-run --tensor-model-parallel-size 3", "does not divide"
    ),
    Bad("a duration below zero", "tracerl", "--exit-duration-in-mins -1", "--exit-duration-in-mins is -1"),
    Bad("no checkpoint to keep", "sft", "--keep-last-n 0", "--keep-last-n is 0"),
    Bad("checkpoints to keep and nowhere to save", "sft", "--keep-last-n 1", "--keep-last-n needs --save", "--save"),
    Bad("a step of no checkpoint", "sft", "--ckpt-step 2", "--ckpt-step needs --load"),
    Bad("a step that is not there", "resume", "--ckpt-step 1", ("iter_0000001", "--ckpt-step"), kind="CheckpointError"),
    Bad("a negative step", "evaluate", "--ckpt-step -2", "--ckpt-step", kind="CheckpointError"),
    Bad("training in float64", "sft", "--fp64", "--fp64"),
    Bad("training of RL in float64", "tracerl", "--fp64", "--fp64"),
    Bad("two precisions", "evaluate", "--fp64 --bf16", ("--fp64", "--bf16")),
    Bad(
        "prompts that are all one",
        "tracerl",
        "",
        ("--rollout-batch-size 2", "1 prompt"),
        write=text("prompts.jsonl", SAME * 9),
    ),
    # ---- several processes
    Bad("a flag on two processes", "sft", "--lr fast", ("--lr", "'fast'"), ranks=2),
    Bad(
        "data on two processes",
        "sft",
        TWO,
        "sft.jsonl, line 3",
        write=line("sft.jsonl", "{"),
        kind="DataError",
        ranks=2,
    ),
    Bad("no data on two processes", "sft", "", "sft.jsonl", write=remove("sft.jsonl"), kind="DataError", ranks=2),
    Bad(
        "no tokenizer on two processes",
        "sft",
        TWO,
        "tokenizer",
        write=folder_at("tokenizer"),
        kind="DataError",
        ranks=2,
    ),
    Bad(
        "a damaged checkpoint on two processes",
        "resume",
        TWO,
        "damaged",
        write=truncate("ckpt/iter_0000002/*.distcp", 0.02),
        kind="CheckpointError",
        ranks=2,
    ),
    Bad(
        "another model on two processes", "tracerl", "--num-layers 4", "--num-layers 2", kind="CheckpointError", ranks=2
    ),
    Bad("nowhere to save on two processes", "sft", "--save sft.jsonl", "--save sft.jsonl", ranks=2),
    Bad(
        "no wandb on two processes",
        "tracerl",
        "--wandb-project p",
        "pip install wandb",
        kind="DependencyError",
        absent=("wandb",),
        ranks=2,
    ),
    Bad("short rows on two processes", "sft", "--max-tokens-per-row 4", "--max-tokens-per-row 4", ranks=2),
    Bad(
        "no judge on two processes",
        "evaluate",
        TWO,
        "pip install",
        kind="DependencyError",
        absent=("math_verify",),
        ranks=2,
    ),
    Bad("a folder as output on two processes", "generate", "--output out", "--output out", ranks=2),
    Bad(
        "no number for a loss on two processes",
        "sft",
        "--lr 1e30 --train-iters 9",
        ("loss", "--lr"),
        kind="TrainingError",
        late=True,
        ranks=2,
    ),
]
