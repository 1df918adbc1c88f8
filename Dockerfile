# megatron_dlm on NVIDIA's PyTorch image, which brings torch, Transformer Engine, Apex and NCCL built for each other.
#
#   docker build -t megatron_dlm .
#   docker run --rm --gpus all --ipc=host --network=host --ulimit memlock=-1 --ulimit stack=67108864 \
#       --user "$(id -u):$(id -g)" -v "$PWD:/workspace" megatron_dlm \
#       torchrun --standalone --nproc-per-node=8 /opt/megatron_dlm/examples/tracerl_8b.sh
#
# docs/launching.md explains the flags. Any command may stand in place of torchrun; without one there is a usage text.

# 26.07 has torch 2.13, the version that the tests run on.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/megatron_dlm
COPY docker docker
# The image's own versions become constraints, so pip installs what is missing, pinned, and leaves its torch alone.
RUN python docker/constraints.py docker/pins.txt > /opt/constraints.txt

COPY . .
RUN PIP_CONSTRAINT=/opt/constraints.txt pip install --editable '.[wandb,tensorboard,reasoning-gym,sentencepiece]' \
    && python docker/constraints.py --check /opt/constraints.txt \
    && python -m compileall -q megatron_dlm \
    && mkdir -p /workspace && chmod 1777 /workspace

# Any user may run it, one without an entry in /etc/passwd too: caches go to HOME, and torch asks for a name.
ENV HOME=/workspace USER=trainer LOGNAME=trainer
WORKDIR /workspace
USER 1000:1000
CMD ["python", "-m", "megatron_dlm", "--help"]
