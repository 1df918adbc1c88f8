#!/usr/bin/env bash
''':' # Bash and Python both can read this file: torchrun starts it with Python, whose part is the last line.
# From an instruct model to one that thinks at length: TraceRL of SDAR-8B, fine-tuning on long chains of thought, and
# TraceRL with responses that grow to 30,000 tokens, with a gate between. As configured for 8 hosts of 8 GPUs:
#
# torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/long_cot_curriculum.sh
#   srun --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 bash examples/long_cot_curriculum.sh
#   SIZE=tiny bash examples/long_cot_curriculum.sh
#
# Every setting can be set in the environment, and flags of `curriculum` may follow the script: --dry-run shows the
# plan, --status where a run stands, --set long-rl.rl.kl_loss_coef=0 changes what no setting does. The same command goes
# on with a run that was stopped, in the stage in which it was. docs/curriculum.md has more.
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"

#       name           8B                          SIZE=tiny
setting MODEL          sdar-8b                     tiny
setting CHECKPOINT     checkpoints/SDAR-8B-Chat    "$TINY/data/sdar"
setting DATA           data/MATH_train.jsonl       "$TINY/data/prompts.jsonl" # of TraceRL
setting THOUGHTS       data/long_cot_sft.jsonl     "$TINY/data/sft.jsonl"     # of fine-tuning
setting EVAL_DATA      data/MATH500.jsonl          "$TINY/data/heldout.jsonl"
setting SAVE           runs/long_cot_8b            "$TINY/long_cot_8b" # a folder per stage in it
setting TP             2                           1  # processes that share a layer
setting CP             4                           1  # processes that share a row, in the stages of long responses
setting STEPS1         80                          1  # RL steps of the first stage, at most
setting STEPS2         1000                        2  # updates of fine-tuning
setting STEPS3         40                          1  # RL steps at each length
setting PROMPTS        128                         4  # of an RL step of the first stage
setting SAMPLES        32                          4  # responses to a prompt there
setting LONG_PROMPTS   64                          4  # and at the lengths below
setting LONG_SAMPLES   16                          4
setting BATCH          128                         8  # responses or samples of an update
setting PROMPT_LEN     784                         32 # tokens
setting RESPONSE_LEN   2000                        12
setting LONG           "[8192, 16384, 30000]"      "[12, 16]" # one after the other
setting LONGEST        30000                       16
setting ROW            12288                       256
setting LONG_ROW       65536                       512
setting SEQ_LEN        32768                       64 # tokens of a sample
setting SCORE          0.75                        0  # right answers that the gate asks for
CHANGES=()
change() { CHANGES+=("$1=$2"); }
file() { CHANGES+=("$1=['$2']"); }
if [ "$TP" -gt 1 ]; then SEQUENCE=true; else SEQUENCE=false; fi
change save "$SAVE"
change defaults.checkpoint.hf_checkpoint "$CHECKPOINT"
if [ -e "$CHECKPOINT/$LATEST" ]; then # of a run
    change defaults.checkpoint.hf_checkpoint null
    change defaults.checkpoint.load "$CHECKPOINT"
fi
change defaults.model.model_preset "$MODEL"
change defaults.parallel.tensor_model_parallel_size "$TP"
change defaults.parallel.sequence_parallel "$SEQUENCE"
change defaults.rollout.rollout_max_prompt_len "$PROMPT_LEN"
change defaults.rollout.rollout_batch_size "$PROMPTS"
change defaults.rollout.n_samples_per_prompt "$SAMPLES"
file defaults.eval.eval_prompt_data "$EVAL_DATA"
change instruct.rollout.rollout_max_response_len "$RESPONSE_LEN"
change instruct.rl.num_rollout "$STEPS1"
change instruct.rl.max_tokens_per_row "$ROW"
change long-sft.parallel.context_parallel_size "$CP"
file long-sft.sft.data_path "$THOUGHTS"
change long-sft.sft.train_iters "$STEPS2"
change long-sft.sft.global_batch_size "$BATCH"
change long-sft.sft.seq_length "$SEQ_LEN"
change long-sft.sft.max_tokens_per_row "$LONG_ROW"
change thinks.gate.at_least "$SCORE"
change long-rl.parallel.context_parallel_size "$CP"
change long-rl.rl.num_rollout "$STEPS3"
change long-rl.rl.max_tokens_per_row "$LONG_ROW"
change long-rl.rollout.rollout_batch_size "$LONG_PROMPTS"
change long-rl.rollout.n_samples_per_prompt "$LONG_SAMPLES"
change long-rl.grow.rollout.rollout_max_response_len "$LONG"
for stage in thinks final; do change $stage.rollout.rollout_max_response_len "$LONGEST"; done
for stage in instruct long-rl; do
    file $stage.rl.prompt_data "$DATA"
    change $stage.rl.global_batch_size "$BATCH"
done
if [ "$SIZE" = tiny ]; then # it computes in fp32, has no chat template, and earns no reward but for digits
    change defaults.model.bf16 false
    change defaults.tokenizer.apply_chat_template false
    change defaults.tokenizer.prompt_template "'{question}'"
    change defaults.eval.eval_num_prompts 8
    change long-sft.optimizer.lr_warmup_iters 1
    for stage in instruct long-rl; do
        change $stage.rl.min_group_accuracy 0
        change $stage.rl.max_group_accuracy 1
        change $stage.reward.format_reward "'.*[0-9].*'"
    done
    change long-rl.reward.overlong_buffer_len 4
fi

launch curriculum --config "$ROOT/configs/long_cot_8b.yaml" --set "${CHANGES[@]}" "$@"
'''; import os, sys; os.execlp("env", "env", f"PYTHON={sys.executable}", "bash", __file__, *sys.argv[1:])  # Python's
