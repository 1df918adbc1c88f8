"""Sizes that do not divide, or do not fit into each other: of the model, of its layout, of rows and texts."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad

TP, PP, EP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size"
CP, VPP = "--context-parallel-size", "--num-virtual-stages-per-pipeline-rank"
ROLLOUT_TP, ROLLOUT_EP = "--rollout-tensor-model-parallel-size", "--rollout-expert-model-parallel-size"
TE = "--transformer-impl transformer_engine"
EXPERTS = "--num-experts 4 --moe-router-topk 2 "

ENTRIES = [
    Bad(
        "heads that do not divide the width",
        "sft",
        "--num-attention-heads 5 --num-query-groups 5",
        ("--num-attention-heads 5", "32"),
    ),
    Bad("groups that do not divide the heads", "sft", "--num-query-groups 3", ("--num-query-groups 3", "1, 2 or 4")),
    Bad("no layers", "sft", "--num-layers 0", "--num-layers is 0"),
    Bad("no heads", "sft", "--num-attention-heads 0", "--num-attention-heads is 0"),
    Bad("no width", "sft", "--hidden-size 0", "--hidden-size is 0"),
    Bad("an odd width of a head", "sft", "--kv-channels 7", ("7 channels", "--kv-channels")),
    Bad("no rotary base", "sft", "--rotary-base 0", "--rotary-base is 0"),
    Bad("a block size of zero", "sft", "--block-size 0", "--block-size is 0"),
    Bad("a vocabulary too small", "sft", "--vocab-size 10", "--vocab-size 10"),
    Bad("a negative width of new weights", "sft", "--init-method-std -1", "--init-method-std is -1"),
    Bad("too many experts per token", "sft", "--num-experts 4 --moe-router-topk 5", "--moe-router-topk 5"),
    Bad("experts without a choice", "sft", "--num-experts 4", "--moe-router-topk"),
    Bad("a choice without experts", "sft", "--moe-router-topk 2", "--num-experts"),
    # ---- layouts
    Bad("tensor parallel over one process", "sft", f"{TP} 2", (f"{TP} 2", "multiple of 2")),
    Bad("tensor parallel over heads", "sft", f"{TP} 3", (f"{TP} 3", "1, 2 or 4")),
    Bad("no tensor parallel", "sft", f"{TP} 0", f"{TP} is 0"),
    Bad("stages that do not divide the layers", "sft", f"{PP} 3", (f"{PP} 3", "1 or 2")),
    Bad("sequence parallel on one process", "sft", "--sequence-parallel", "--sequence-parallel"),
    Bad("virtual stages of one stage", "sft", f"{VPP} 2", (f"{VPP} 2", f"{PP} 2 or more")),
    Bad("context parallel over one process", "tracerl", f"{CP} 2", (f"{CP} 2", "multiple of 2")),
    Bad("expert parallel without experts", "sft", f"{EP} 2", f"{EP} 2"),
    Bad("expert parallel that does not divide", "sft", f"{EXPERTS}{EP} 3", f"{EP} 3"),
    Bad("expert parallel in rollouts", "tracerl", f"{EXPERTS}{ROLLOUT_EP} 2", (f"{ROLLOUT_EP} 2", "1 processes")),
    Bad("rollout experts that do not divide", "tracerl", f"{EXPERTS}{ROLLOUT_EP} 3", (f"{ROLLOUT_EP} 3", "1, 2 or 4")),
    Bad("full recomputation of nothing", "sft", "--recompute-granularity full", "--recompute-method"),
    Bad(
        "an offloaded optimizer of an fp32 model",
        "sft",
        "--optimizer-cpu-offload",
        ("--optimizer-cpu-offload", "--bf16"),
    ),
    Bad("recomputation of nothing", "sft", "--recompute-num-layers 1", "--recompute-granularity"),
    Bad(
        "recomputation of more layers than there are",
        "sft",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 9",
        "--recompute-num-layers is 9",
    ),
    Bad(
        "recomputation of experts that are not there",
        "tracerl",
        "--recompute-granularity selective --recompute-modules moe",
        ("--recompute-modules", "no experts"),
    ),
    Bad("overlap of what is not there", "sft", "--overlap-param-gather", "--use-distributed-optimizer"),
    Bad("less than no silence", "sft", "--host-timeout-seconds -1", "--host-timeout-seconds is -1"),
    Bad("no time for collectives", "sft", "--distributed-timeout-minutes 0", "--distributed-timeout-minutes is 0"),
    Bad("a loss of less than no targets", "sft", "--loss-chunk-size -1", "--loss-chunk-size is -1"),
    Bad(
        "kernels for a table that is kept",
        "sft",
        "--loss-head triton --loss-chunk-size 0",
        ("--loss-head triton", "--loss-chunk-size 0"),
    ),
    Bad(
        "kernels of a GPU for the loss on a CPU",
        "tracerl",
        "--loss-head triton",
        ("--loss-head triton", "no GPU", "--loss-head auto"),
        kind="DependencyError",
        environment={"TRITON_INTERPRET": "0"},
    ),
    Bad(
        "kernels in Triton without triton",
        "sft",
        "--loss-head triton",
        ("triton is not installed", "--loss-head auto"),
        kind="DependencyError",
        absent=("triton",),
        environment={"TRITON_INTERPRET": "1"},
    ),
    Bad(
        "kernels of a GPU for scores on a CPU",
        "score",
        "--loss-head triton",
        ("--loss-head triton", "no GPU", "--loss-head auto"),
        kind="DependencyError",
        environment={"TRITON_INTERPRET": "0"},
    ),
    Bad(
        "no such attention of step maps", "trace", "--attention-backend sdpa", ("--attention-backend", "dense", "flex")
    ),
    Bad("a loss head of what only rolls out", "generate", "--loss-head torch", "has no flag --loss-head"),
    Bad("FP8 of plain layers", "sft", "--fp8-format hybrid --bf16", ("--fp8-format hybrid", "transformer_engine")),
    Bad("FP8 of an fp32 model", "tracerl", f"{TE} --fp8-format e4m3", ("--fp8-format e4m3", "--bf16")),
    Bad("a recipe without FP8", "sft", "--fp8-recipe blockwise", ("--fp8-recipe blockwise", "--fp8-format")),
    Bad(
        "FP8 of narrow layers",
        "sft",
        f"{TE} --fp8-format hybrid --bf16 --ffn-hidden-size 72",
        ("--ffn-hidden-size is 72", "16"),
    ),
    Bad(
        "weights in FP8 without shards",
        "tracerl",
        f"{TE} --fp8-format hybrid --bf16 --fp8-param-gather",
        "--use-distributed-optimizer",
    ),
    Bad(
        "adapters beside weights in FP8",
        "sft",
        f"{TE} --fp8-format hybrid --bf16 --fp8-param-gather --use-distributed-optimizer --load ckpt --lora-rank 2",
        ("--lora-rank 2", "--fp8-param-gather"),
    ),
    Bad("fused layers without a GPU", "sft", TE, (TE, "GPU"), kind="DependencyError"),
    Bad("a timeout beyond time", "sft", f"--distributed-timeout-minutes {10**9}", "--distributed-timeout-minutes"),
    Bad("three processes for tensor parallel 2", "sft", f"{TP} 2", ("3 processes", f"{TP} 2"), ranks=3),
    Bad("two processes for tensor parallel 4", "sft", f"{TP} 4", ("2 processes", f"{TP} 4"), ranks=2),
    Bad("two processes for four stages", "sft", f"--num-layers 4 {PP} 4", ("2 processes", f"{PP} 4"), ranks=2),
    Bad("query groups for a rollout", "tracerl", f"{TP} 4", (f"{TP} 4", "2 query groups"), ranks=4),
    Bad("query groups for a split rollout", "tracerl", f"{ROLLOUT_TP} 4", (f"{ROLLOUT_TP} 4", "2 query"), ranks=4),
    Bad("a rollout larger than the job", "tracerl", f"{ROLLOUT_TP} 2", (f"{ROLLOUT_TP} 2", "1 processes")),
    Bad("an evaluation larger than the job", "evaluate", f"{ROLLOUT_TP} 2", (f"{ROLLOUT_TP} 2", "1 processes")),
    Bad("a rollout without tensor parallel", "tracerl", f"{ROLLOUT_TP} 0", f"{ROLLOUT_TP} is 0"),
    Bad("expert parallel rollouts without experts", "tracerl", f"{ROLLOUT_EP} 2", (f"{ROLLOUT_EP} 2", "experts")),
    Bad("no bucket for a refit", "tracerl", "--refit-bucket-mib 0", "--refit-bucket-mib is 0"),
    # ---- rows and texts
    Bad("rows too short for a sample", "sft", "--max-tokens-per-row 4", "--max-tokens-per-row 4"),
    Bad("rows too short for a trace", "tracerl", "--max-tokens-per-row 16", "--max-tokens-per-row 16"),
    Bad("samples longer than positions", "sft", "--seq-length 129", ("--seq-length 129", "128")),
    Bad("responses longer than positions", "tracerl", "--rollout-max-response-len 100", ("132", "128")),
    Bad("evaluation longer than positions", "evaluate", "--eval-max-response-len 100", ("132", "128")),
    Bad("all samples too long", "sft", "--seq-length 3", ("--seq-length 3", "25"), kind="DataError"),
    Bad("all prompts too long", "tracerl", "--rollout-max-prompt-len 2", "2 tokens", kind="DataError"),
    Bad("all prompts to evaluate too long", "evaluate", "--rollout-max-prompt-len 2", "2 tokens", kind="DataError"),
    Bad("more prompts a step than there are", "tracerl", "--rollout-batch-size 26", ("--rollout-batch-size 26", "25")),
    Bad(
        "more prompts in work than there are",
        "tracerl",
        "--over-sampling-batch-size 26",
        ("--over-sampling-batch-size 26", "25"),
    ),
]
