#!/usr/bin/env bash
# From nothing to a model that got better by TraceRL, on a CPU: make data, learn by supervised fine-tuning, improve by TraceRL, compare.
#
#   bash examples/quickstart.sh [--seed N] [--data FILE.jsonl] [--output DIR]
#
# Without --data the problems are sums of three numbers. FILE.jsonl has lines with `question` and `ground_truth_answer` (word problems, say).
# Every size can be set in the environment, for example RL_STEPS=60 bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SEED=1 DATA= OUTPUT=
while [ $# -gt 0 ]; do
    case $1 in
        --seed) SEED=$2 ;; --data) DATA=$2 ;; --output) OUTPUT=$2 ;;
        *) echo "quickstart.sh knows --seed, --data and --output, not $1." >&2; exit 2 ;;
    esac
    shift 2
done
OUTPUT=${OUTPUT:-runs/quickstart${DATA:+-$(basename "$DATA" .jsonl)}-seed$SEED}
[ -z "$DATA" ] || [ -r "$DATA" ] || { echo "There is no file $DATA. Give --data a readable JSONL file." >&2; exit 2; }

. tools/environment.sh
use_environment plot
rm -rf "$OUTPUT" && mkdir -p "$OUTPUT"

SFT_STEPS=${SFT_STEPS:-600} RL_STEPS=${RL_STEPS:-30}
MODEL=(--model-preset tiny --tokenizer-model "$OUTPUT/data/tokenizer" --seed "$SEED")
ROLLOUT=(--rollout-max-response-len "${MAX_RESPONSE:-16}")
EVAL=(--eval-prompt-data "$OUTPUT/data/heldout.jsonl" --eval-temperature 1.0 --eval-remasking dynamic static)

python tools/make_quickstart_data.py --output "$OUTPUT/data" --seed "$SEED" ${DATA:+--source "$DATA"}

echo; echo "== 1. Supervised fine-tuning, $SFT_STEPS steps"
python -m megatron_dlm sft "${MODEL[@]}" --data-path "$OUTPUT/data/sft.jsonl" --train-iters "$SFT_STEPS" --global-batch-size 128 \
    --lr 2e-3 --lr-warmup-iters 20 --log-interval 50 --save "$OUTPUT/sft" --metrics-jsonl "$OUTPUT/sft.jsonl"

echo; echo "== 2. TraceRL from there, $RL_STEPS steps"
python -m megatron_dlm tracerl "${MODEL[@]}" "${ROLLOUT[@]}" --load "$OUTPUT/sft" --finetune --prompt-data "$OUTPUT/data/prompts.jsonl" \
    --num-rollout "$RL_STEPS" --rollout-batch-size 64 --n-samples-per-prompt 16 --num-steps-per-rollout 4 --use-rollout-logprobs \
    --lr 1e-4 --save "$OUTPUT/tracerl" --metrics-jsonl "$OUTPUT/tracerl.jsonl"

echo; echo "== 3. For comparison: more supervised fine-tuning, for the seconds that TraceRL took"
MINUTES=$(python tools/quickstart_report.py minutes "$OUTPUT/tracerl.jsonl")
python -m megatron_dlm sft "${MODEL[@]}" --data-path "$OUTPUT/data/sft.jsonl" --train-iters 1000000 --global-batch-size 128 \
    --lr 2e-3 --log-interval 100 --exit-duration-in-mins "$MINUTES" --load "$OUTPUT/sft" --save "$OUTPUT/sft-continued"

echo; echo "== 4. Before and after, on held-out problems"
for stage in sft sft-continued tracerl; do
    python -m megatron_dlm evaluate "${MODEL[@]}" "${ROLLOUT[@]}" "${EVAL[@]}" --load "$OUTPUT/$stage" --metrics-jsonl "$OUTPUT/eval-$stage.jsonl" >/dev/null
done
python tools/quickstart_report.py report "$OUTPUT"
