#!/usr/bin/env bash
''':' # Bash and Python both can read this file: torchrun starts it with Python, whose part is the last line.
# Larger blocks by TraceRL: first SDAR-8B decides in blocks of 4 and learns in blocks of 8, then it does both in blocks
# of 8. As configured for 8 hosts of 8 GPUs:
#
#   torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/block_expansion_8b.sh
#   srun --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 bash examples/block_expansion_8b.sh
#   SIZE=tiny bash examples/block_expansion_8b.sh
#
# Every setting can be set in the environment, and flags of `tracerl` may follow the script; they hold for both phases.
# The same command goes on with a run that was stopped, in the phase in which it was. docs/launching.md has more.
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"

#       name           8B                         SIZE=tiny
setting MODEL          sdar-8b                    tiny
setting CHECKPOINT     checkpoints/SDAR-8B-Chat   "$TINY/data/sdar"
setting DATA           data/MATH_train.jsonl      "$TINY/data/prompts.jsonl"
setting EVAL_DATA      data/MATH500.jsonl         "$TINY/data/heldout.jsonl"
setting SAVE           runs/block_expansion_8b    "$TINY/block_expansion_8b" # phase1 and phase2 in it
setting TP             2                          1  # processes that share a layer
setting PP             1                          1  # pipeline stages
setting VPP            1                          1  # parts of a stage that are interleaved
setting CP             1                          1  # processes that share a row
setting STEPS1         60                         2  # RL steps of the first phase
setting STEPS2         40                         2  # and of the second
setting PROMPTS        128                        4  # of an RL step
setting SAMPLES        32                         4  # responses to a prompt
setting BATCH          64                         8  # responses of an update
setting PROMPT_LEN     784                        32 # tokens
setting RESPONSE_LEN   2000                       16
setting ROW            20480                      512
setting EVAL_INTERVAL  5                          2
layout
FLAGS=(--model-preset "$MODEL" "${LAYOUT[@]}" --prompt-data "$DATA" --eval-prompt-data "$EVAL_DATA"
    --eval-interval "$EVAL_INTERVAL" --rollout-batch-size "$PROMPTS" --n-samples-per-prompt "$SAMPLES"
    --global-batch-size "$BATCH" --rollout-max-prompt-len "$PROMPT_LEN" --rollout-max-response-len "$RESPONSE_LEN"
    --max-tokens-per-row "$ROW" "${TINY_FLAGS[@]}" "${TINY_RL_FLAGS[@]}" "$@")

if ! finished "$SAVE/phase1" "$STEPS1"; then
    weights "$CHECKPOINT" "$SAVE/phase1"
    run tracerl --config "$ROOT/configs/block_expansion_4_to_8_phase1.yaml" "${WEIGHTS[@]}" "${FLAGS[@]}" \
        --num-rollout "$STEPS1"
    finished "$SAVE/phase1" "$STEPS1" || exit 0 # it was told to stop early, or this is a dry run
fi
weights "$SAVE/phase1" "$SAVE/phase2"
launch tracerl --config "$ROOT/configs/block_expansion_4_to_8_phase2.yaml" "${WEIGHTS[@]}" "${FLAGS[@]}" \
    --num-rollout "$STEPS2"
'''; import os, sys; os.execlp("env", "env", f"PYTHON={sys.executable}", "bash", __file__, *sys.argv[1:])  # Python's
