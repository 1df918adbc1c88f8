"""Schedules of learning rate and weight decay, and low-rank adapters."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad

WSD, STYLE = "--lr-decay-style WSD", "--weight-decay-incr-style"
LORA = "--load ckpt --finetune --lora-rank 4"
EXPERTS = "--num-experts 4 --moe-router-topk 2"

ENTRIES = [
    Bad("no such schedule", "sft", "--lr-decay-style wsd", ("--lr-decay-style", "'wsd'")),
    Bad("a schedule with an end and no length of it", "sft", WSD, (WSD, "--lr-wsd-decay-iters")),
    Bad("an end of another schedule", "sft", "--lr-wsd-decay-iters 2", ("--lr-wsd-decay-iters 2", WSD)),
    Bad("an end longer than the run", "sft", f"{WSD} --lr-wsd-decay-iters 4", ("--lr-wsd-decay-iters 4", "3 steps")),
    Bad(
        "an end that meets the warm-up",
        "sft",
        f"{WSD} --lr-wsd-decay-iters 2 --lr-warmup-fraction 0.7",
        ("--lr-wsd-decay-iters 2", "1 steps"),
    ),
    Bad("a warm-up of the whole run", "sft", "--lr-warmup-fraction 1", "--lr-warmup-fraction is 1.0"),
    Bad(
        "two warm-ups",
        "sft",
        "--lr-warmup-fraction 0.5 --lr-warmup-iters 1",
        ("--lr-warmup-fraction", "--lr-warmup-iters"),
    ),
    Bad("the beginning of no warm-up", "sft", "--lr-warmup-init 1e-6", "--lr-warmup-init 1e-06 does nothing"),
    Bad(
        "a warm-up from above",
        "sft",
        "--lr-warmup-init 1 --lr-warmup-iters 1",
        ("--lr-warmup-init 1.0", "--lr 0.0001"),
    ),
    Bad("half of an increase", "sft", f"{STYLE} linear --end-weight-decay 0.1", (STYLE, "--start-weight-decay")),
    Bad("an increase of nothing", "sft", "--end-weight-decay 0.1", ("--end-weight-decay 0.1", STYLE)),
    Bad(
        "an increase downwards",
        "sft",
        f"{STYLE} cosine --start-weight-decay 0.2 --end-weight-decay 0.1",
        ("--start-weight-decay 0.2", "--end-weight-decay 0.1"),
    ),
    Bad(
        "an increase and a constant",
        "sft",
        f"{STYLE} linear --start-weight-decay 0 --end-weight-decay 0.1 --weight-decay 0.1",
        ("--weight-decay 0.1", STYLE),
    ),
    Bad(
        "an end of the value model's schedule that is too long",
        "tracerl",
        "--use-value-model --value-lr-decay-style WSD --value-lr-wsd-decay-iters 9",
        ("--value-lr-wsd-decay-iters 9", "updates of the value model"),
    ),
    # ---- adapters
    Bad("no rank", "sft", LORA.replace("4", "0"), "--lora-rank is 0"),
    Bad("no alpha", "sft", f"{LORA} --lora-alpha 0", "--lora-alpha is 0"),
    Bad("adapters of no rank", "tracerl", "--lora-alpha 16", ("--lora-alpha 16.0", "--lora-rank")),
    Bad(
        "adapters of no layer", "sft", f"{LORA} --lora-target-modules linear_v", ("--lora-target-modules", "'linear_v'")
    ),
    Bad("a layer twice", "sft", f"{LORA} --lora-target-modules linear_qkv linear_qkv", "linear_qkv linear_qkv"),
    Bad("adapters beside random weights", "sft", "--lora-rank 4", ("--lora-rank 4", "--hf-checkpoint")),
    Bad("adapters of experts", "sft", f"{LORA} {EXPERTS}", ("linear_fc1 linear_fc2", "linear_qkv and linear_proj")),
    Bad(
        "adapters in SGLang",
        "tracerl",
        "--lora-rank 4 --rollout-backend sglang --sglang-python /bin/true",
        ("--lora-rank", "native"),
    ),
    Bad(
        "adapters in a run that had none",
        "resume",
        "--lora-rank 4",
        ("no adapters", "--lora-rank 4", "--finetune"),
        kind="CheckpointError",
    ),
    Bad("nothing to merge", "convert merge-lora --load ckpt --save new", says="ckpt has no", kind="CheckpointError"),
]
