#!/usr/bin/env bash
''':' # Bash and Python both can read this file: torchrun starts it with Python, whose part is the last line.
# Supervised fine-tuning of SDAR-8B on JSON lines with `question` and `response`, or `messages`. As configured for 4
# hosts of 8 GPUs. With an autoregressive Qwen3-8B as CHECKPOINT the model learns block diffusion first.
#
#   torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/sft_8b.sh
#   srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 bash examples/sft_8b.sh
#   SIZE=tiny bash examples/sft_8b.sh
#
# Every setting can be set in the environment, and flags of `sft` may follow the script. The same command goes on
# with a run that was stopped. docs/launching.md has more.
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"

#       name         8B                         SIZE=tiny
setting MODEL        sdar-8b                    tiny
setting CHECKPOINT   checkpoints/SDAR-8B-Chat   "$TINY/data/sdar"
setting DATA         data/sft.jsonl             "$TINY/data/sft.jsonl"
setting SAVE         runs/sft_8b                "$TINY/sft_8b"
setting TP           2                          1   # processes that share a layer
setting PP           1                          1   # pipeline stages
setting VPP          1                          1   # parts of a stage that are interleaved
setting CP           1                          1   # processes that share a row
setting STEPS        2000                       2   # updates
setting WARMUP       100                        1   # of them with a rising learning rate
setting BATCH        256                        16  # samples of an update
setting SEQ_LEN      4096                       64  # tokens
setting ROW          16384                      256
setting LR           1e-5                       1e-3
layout
weights "$CHECKPOINT" "$SAVE"

launch sft --config "$ROOT/configs/sft_8b.yaml" --model-preset "$MODEL" "${WEIGHTS[@]}" "${LAYOUT[@]}" \
    --data-path "$DATA" --train-iters "$STEPS" --lr-warmup-iters "$WARMUP" --global-batch-size "$BATCH" \
    --seq-length "$SEQ_LEN" --max-tokens-per-row "$ROW" --lr "$LR" "${TINY_FLAGS[@]}" "$@"
'''; import os, sys; os.execlp("env", "env", f"PYTHON={sys.executable}", "bash", __file__, *sys.argv[1:])  # Python's
