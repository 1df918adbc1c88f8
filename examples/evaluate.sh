#!/usr/bin/env bash
''':' # Bash and Python both can read this file: torchrun starts it with Python, whose part is the last line.
# Accuracy, length and speed of a checkpoint on held-out prompts; here of TraDo-8B-Instruct on MATH500, by one host of 8
# GPUs with a model on each. CHECKPOINT is a folder of HuggingFace's format, or the SAVE of a training run.
#
#   torchrun --standalone --nproc-per-node=8 examples/evaluate.sh
#   srun --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 bash examples/evaluate.sh
#   SIZE=tiny bash examples/evaluate.sh
#
# Every setting can be set in the environment, and flags of `evaluate` may follow the script (docs/launching.md).
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"

#       name          8B                              SIZE=tiny
setting CHECKPOINT    checkpoints/TraDo-8B-Instruct   "$TINY/data/sdar"
setting DATA          data/MATH500.jsonl              "$TINY/data/heldout.jsonl"
setting SAVE          runs/evaluate                   "$TINY/evaluate"
setting TP            1                               1  # processes that share a layer
setting SAMPLES       3                               1  # responses to a prompt
setting PROMPT_LEN    784                             32 # tokens
setting RESPONSE_LEN  2000                            12
setting TEMPERATURE   1.0                             1.0
source_of "$CHECKPOINT"
TEMPLATE=$'{question}\nPlease reason step by step, and put your final answer within \\boxed{}.'

launch evaluate "${SOURCE[@]}" --tensor-model-parallel-size "$TP" --bf16 --eval-prompt-data "$DATA" \
    --apply-chat-template --prompt-template "$TEMPLATE" --n-samples-per-eval-prompt "$SAMPLES" \
    --eval-remasking dynamic static --eval-temperature "$TEMPERATURE" --rollout-max-prompt-len "$PROMPT_LEN" \
    --rollout-max-response-len "$RESPONSE_LEN" --metrics-jsonl "$SAVE/metrics.jsonl" \
    --save-eval-samples "$SAVE/samples.jsonl" "${TINY_FLAGS[@]}" "$@"
'''; import os, sys; os.execlp("env", "env", f"PYTHON={sys.executable}", "bash", __file__, *sys.argv[1:])  # Python's
