#!/usr/bin/env bash
# From nothing to a model that got better by TraceRL, on a CPU: make data, learn by supervised fine-tuning, improve by
# TraceRL, compare.
#
#   bash examples/quickstart.sh [--seed N] [--data FILE.jsonl] [--output DIR]
#
# Without --data the problems are sums of three numbers, and the demonstrations come from an unreliable teacher, who
# slips in a share SLIPS of them: imitation learns the slips too, a reward for right answers does not.
# FILE.jsonl has lines with `question` and `ground_truth_answer` (word problems, say).
# Every size can be set in the environment, for example RL_STEPS=60 bash examples/quickstart.sh
set -euo pipefail

SEED=1 DATA= OUTPUT=
while [ $# -gt 0 ]; do
    case $1 in --seed | --data | --output) ;; *) echo "quickstart.sh knows --seed, --data and --output, not $1." >&2; exit 2 ;; esac
    [ $# -gt 1 ] || { echo "$1 needs a value. Write it after the flag." >&2; exit 2; }
    case $1 in --seed) SEED=$2 ;; --data) DATA=$(realpath -- "$2") ;; --output) OUTPUT=$(realpath -m -- "$2") ;; esac
    shift 2
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUTPUT=${OUTPUT:-runs/quickstart${DATA:+-$(basename "$DATA" .jsonl)}-seed$SEED}
[ -z "$DATA" ] || [ -r "$DATA" ] || { echo "There is no file $DATA. Give --data a readable JSONL file." >&2; exit 2; }
if [ -e "$OUTPUT" ]; then # replaced if it is an earlier run of this script, and only then
    [ -e "$OUTPUT/.quickstart" ] || { echo "$OUTPUT exists and is no earlier quickstart. Give another --output." >&2; exit 2; }
    rm -rf "$OUTPUT"
fi
mkdir -p "$OUTPUT" && touch "$OUTPUT/.quickstart"

. tools/environment.sh
use_environment
# Threads that wait for each other sleep instead of spinning: a busy laptop would otherwise slow down many times over.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

SFT_STEPS=${SFT_STEPS:-500} RL_STEPS=${RL_STEPS:-30} SLIPS=${SLIPS:-0.35}
MODEL=(--model-preset tiny --init-method-std 0.08 --tokenizer-model "$OUTPUT/data/tokenizer") # kept in the checkpoint
SFT=(--seed "$SEED" --data-path "$OUTPUT/data/sft.jsonl" --global-batch-size 128 --lr 2e-3 --adam-beta2 0.99 --max-tokens-per-row 4608)
RESPONSE=(--rollout-max-response-len "${MAX_RESPONSE:-20}")
EVAL=(--eval-prompt-data "$OUTPUT/data/heldout.jsonl" --eval-temperature 1.0 --eval-remasking dynamic static)

python tools/make_quickstart_data.py --output "$OUTPUT/data" --seed "$SEED" --slips "$SLIPS" ${DATA:+--source "$DATA"}

echo; echo "== 1. Supervised fine-tuning, $SFT_STEPS steps"
python -m megatron_dlm sft "${MODEL[@]}" "${SFT[@]}" --train-iters "$SFT_STEPS" --lr-warmup-iters 20 --log-interval 50 \
    --save "$OUTPUT/sft" --metrics-jsonl "$OUTPUT/sft.jsonl"

echo; echo "== 2. TraceRL from there, $RL_STEPS steps"
python -m megatron_dlm tracerl --seed "$SEED" "${RESPONSE[@]}" --load "$OUTPUT/sft" --finetune \
    --prompt-data "$OUTPUT/data/prompts.jsonl" --num-rollout "$RL_STEPS" --rollout-batch-size 64 --n-samples-per-prompt 16 \
    --num-steps-per-rollout 4 --old-logprobs rollout --max-tokens-per-row 4608 --lr 1e-4 --log-interval 1 \
    --save "$OUTPUT/tracerl" --metrics-jsonl "$OUTPUT/tracerl.jsonl"

echo; echo "== 3. For comparison: more supervised fine-tuning, for the seconds that TraceRL took"
MINUTES=$(python tools/quickstart_report.py minutes "$OUTPUT")
python -m megatron_dlm sft "${SFT[@]}" --train-iters 1000000 --exit-duration-in-mins "$MINUTES" --log-interval 100 \
    --load "$OUTPUT/sft" --save "$OUTPUT/sft-continued"

echo; echo "== 4. Before and after, on held-out problems"
for stage in sft sft-continued tracerl; do
    python -m megatron_dlm evaluate --seed "$SEED" "${RESPONSE[@]}" "${EVAL[@]}" --load "$OUTPUT/$stage" \
        --metrics-jsonl "$OUTPUT/eval-$stage.jsonl" >/dev/null
done
python tools/quickstart_report.py report "$OUTPUT"
