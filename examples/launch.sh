# Sourced by the examples: gives settings their values, finds out where the job runs, and starts it. See README.md.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)
PYTHON=${PYTHON:-python} SIZE=${SIZE:-full} TINY=${TINY:-runs/tiny}
LATEST=latest_checkpointed_iteration.txt
refuse() { echo "$(basename "$0"): $*" >&2; exit 2; }
case $SIZE in full | tiny) ;; *) refuse "SIZE is $SIZE. Use full (the default) or tiny." ;; esac
command -v "$PYTHON" >/dev/null || refuse "There is no $PYTHON here. Activate an environment, or set PYTHON=/its/path."

# setting NAME FULL TINY: the value of a variable that the environment does not have.
setting() {
    if [ -n "${!1:-}" ]; then return; fi
    if [ "$SIZE" = tiny ]; then printf -v "$1" %s "$3"; else printf -v "$1" %s "$2"; fi
}

# layout: LAYOUT, the flags of TP, PP, CP, and of VPP and EP where they are set.
layout() {
    LAYOUT=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP")
    if [ "$TP" -gt 1 ]; then LAYOUT+=(--sequence-parallel); else LAYOUT+=(--no-sequence-parallel); fi
    if [ "${VPP:-1}" -gt 1 ]; then LAYOUT+=(--num-virtual-stages-per-pipeline-rank "$VPP"); fi
    if [ -n "${EP:-}" ]; then LAYOUT+=(--expert-model-parallel-size "$EP"); fi
}

# source_of FOLDER: SOURCE, the flag that reads it: a checkpoint of a run, or one of HuggingFace.
source_of() { if [ -e "$1/$LATEST" ]; then SOURCE=(--load "$1"); else SOURCE=(--hf-checkpoint "$1"); fi; }

# weights FROM SAVE: WEIGHTS, the flags that go on with what lies in SAVE, or begin with FROM.
weights() {
    if [ -e "$2/$LATEST" ]; then
        WEIGHTS=(--load "$2")
    else
        source_of "$1"
        WEIGHTS=("${SOURCE[@]}")
        if [ "${SOURCE[0]}" = --load ]; then WEIGHTS+=(--finetune); fi
    fi
    WEIGHTS+=(--save "$2")
}

# finished SAVE STEP: whether a run has come so far.
finished() { [ -e "$1/$LATEST" ] && [ "$(<"$1/$LATEST")" -ge "$2" ]; }

dry_run() { case " $* " in *" --dry-run "* | *" --help "* | *" --status "*) true ;; *) false ;; esac; }

# launch COMMAND FLAG...: replaces this shell by the job, or by the one rank of it that this shell was started for.
launch() {
    prepare "$@"
    exec "${JOB[@]}" "$@"
}

# run COMMAND FLAG...: the same, but comes back when the job has succeeded. A signal stops the job, and then this shell.
run() {
    local code stopped='' child
    prepare "$@"
    "${JOB[@]}" "$@" &
    child=$!
    trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
    while code=0; wait "$child" || code=$?; [ -n "$stopped" ]; do stopped=''; done
    trap - TERM INT
    if [ "$code" -ne 0 ]; then exit "$code"; fi
    if [ -n "${MASTER_PORT:-}" ]; then # the next job meets elsewhere: this one may not be gone on all hosts
        export MASTER_PORT=$((MASTER_PORT + 1)) TORCHELASTIC_USE_AGENT_STORE=False
    fi
}

# prepare COMMAND FLAG...: JOB, what the command and its flags are to be appended to.
prepare() {
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron-core overlaps communication by it
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds to save in after SIGTERM
    JOB=("$PYTHON" -u -m megatron_dlm)
    if [ -z "${LOCAL_RANK:-}" ] && ! dry_run "$@"; then find_hosts; fi
    if [ "$SIZE" = tiny ]; then tiny_files; fi
    if [ -n "${LOCAL_RANK:-}" ] || dry_run "$@" || [ "$NNODES $NPROC_PER_NODE" = "1 1" ]; then return; fi
    local meeting=(--standalone)
    if [ "$NNODES" -gt 1 ]; then
        meeting=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    fi
    JOB=("$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$NPROC_PER_NODE" -m megatron_dlm)
}

# find_hosts: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE, from the environment or from Slurm. Where
# srun has started a task per GPU, these are the ranks.
find_hosts() {
    if [ -n "${SLURM_STEP_NUM_NODES:-}" ]; then
        NNODES=${NNODES:-$SLURM_STEP_NUM_NODES} NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
        NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
        MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
        if [ -z "${MASTER_ADDR:-}" ]; then read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_STEP_NODELIST"); fi
        if [ "$SLURM_STEP_NUM_TASKS" -gt "$SLURM_STEP_NUM_NODES" ]; then
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS MASTER_ADDR MASTER_PORT
            return
        fi
    elif [ -z "${NNODES:-}" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
        refuse "This Slurm job has $SLURM_JOB_NUM_NODES hosts, and this script runs on one of them. Start it with srun."
    fi
    NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=${MASTER_PORT:-29500}
    if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        refuse "NNODES is $NNODES, and MASTER_ADDR is not set. Set it to the name of the host whose NODE_RANK is 0."
    fi
    if [ -z "${NPROC_PER_NODE:-}" ]; then
        # No pipe into grep -q: with pipefail a list that is still being written when grep has left would be no GPU.
        case $(nvidia-smi -L 2>/dev/null || true) in *GPU*) NPROC_PER_NODE=gpu ;; *) NPROC_PER_NODE=1 ;; esac
    fi
}

# What the tiny model needs besides: it has no chat template, computes in fp32, and earns no reward but for digits.
TINY_FLAGS=() TINY_RL_FLAGS=()
if [ "$SIZE" = tiny ]; then
    TINY_FLAGS=(--no-bf16 --no-apply-chat-template --prompt-template "{question}")
    TINY_RL_FLAGS=(--min-group-accuracy 0 --max-group-accuracy 1 --format-reward ".*[0-9].*" --eval-num-prompts 8)
fi

# tiny_files: makes data and checkpoints in TINY once, whoever comes first; the other ranks and hosts wait.
tiny_files() {
    local until=$((SECONDS + 300))
    if [ "${RANK:-${NODE_RANK:-0}}" = 0 ] && [ ! -d "$TINY/data" ]; then
        mkdir -p "$TINY"
        "$PYTHON" "$ROOT/tools/make_tiny.py" --output "$TINY/data.$$"
        mv -T "$TINY/data.$$" "$TINY/data" 2>/dev/null || rm -rf "$TINY/data.$$" # another job was faster
    fi
    until [ -d "$TINY/data" ]; do
        [ "$SECONDS" -lt "$until" ] || refuse "$TINY/data has not appeared. It has to be a folder that all hosts see."
        sleep 0.2
    done
}
