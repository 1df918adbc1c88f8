#!/usr/bin/env bash
''':' # Bash and Python both can read this file: torchrun starts it with Python, whose part is the last line.
# TraceRL of SDAR-8B on mathematics (TraDo-8B-Instruct). As configured for 8 hosts of 8 GPUs:
#
#   torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/tracerl_8b.sh
#   srun --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 bash examples/tracerl_8b.sh
#   SIZE=tiny bash examples/tracerl_8b.sh
#
# Every setting can be set in the environment, and flags of `tracerl` may follow the script (--dry-run, say). The same
# command goes on with a run that was stopped. docs/launching.md has more.
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"

#       name           8B                         SIZE=tiny
setting MODEL          sdar-8b                    tiny
setting CHECKPOINT     checkpoints/SDAR-8B-Chat   "$TINY/data/sdar"
setting DATA           data/MATH_train.jsonl      "$TINY/data/prompts.jsonl"
setting EVAL_DATA      data/MATH500.jsonl         "$TINY/data/heldout.jsonl"
setting SAVE           runs/tracerl_8b            "$TINY/tracerl_8b"
setting TP             2                          1  # processes that share a layer
setting PP             1                          1  # pipeline stages
setting VPP            1                          1  # parts of a stage that are interleaved
setting CP             1                          1  # processes that share a row
setting STEPS          160                        2  # RL steps
setting PROMPTS        128                        4  # of an RL step
setting SAMPLES        32                         4  # responses to a prompt
setting BATCH          128                        8  # responses of an update
setting PROMPT_LEN     784                        32 # tokens
setting RESPONSE_LEN   2000                       12
setting ROW            12288                      256
setting EVAL_INTERVAL  5                          2
layout
weights "$CHECKPOINT" "$SAVE"

launch tracerl --config "$ROOT/configs/tracerl_8b_math.yaml" --model-preset "$MODEL" "${WEIGHTS[@]}" "${LAYOUT[@]}" \
    --prompt-data "$DATA" --eval-prompt-data "$EVAL_DATA" --eval-interval "$EVAL_INTERVAL" --num-rollout "$STEPS" \
    --rollout-batch-size "$PROMPTS" --n-samples-per-prompt "$SAMPLES" --global-batch-size "$BATCH" \
    --rollout-max-prompt-len "$PROMPT_LEN" --rollout-max-response-len "$RESPONSE_LEN" --max-tokens-per-row "$ROW" \
    "${TINY_FLAGS[@]}" "${TINY_RL_FLAGS[@]}" "$@"
'''; import os, sys; os.execlp("env", "env", f"PYTHON={sys.executable}", "bash", __file__, *sys.argv[1:])  # Python's
