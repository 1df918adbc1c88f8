"""What cannot work with SGLang as the rollout backend, refused before anything is built.

What concerns the model is a matter of tables; what concerns the other interpreter is asked of it, by a short script
that imports nothing of SGLang.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dlm.checkpoint.hf.exporter import check_described
from megatron_dlm.checkpoint.hf.families import FAMILIES, Family
from megatron_dlm.checkpoint.hf.stored import whole_model
from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.rollout.sglang.plugin import OLDEST, parse_version

SERVED = ("sdar", "sdar-moe", "llada2")  # the families of SGLang's table of diffusion models that we know
_NEEDED = ".".join(map(str, OLDEST))
_SECONDS = 120
_PROBE = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({"python": list(sys.version_info[:3]), "sglang": version("sglang"), "torch": version("torch")}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """What another interpreter says of itself; versions of packages are None where they are missing."""

    python: tuple[int, ...]
    sglang: str | None
    torch: str | None


def check_backend(rollout: EngineConfig, model: ModelConfig, tensor_parallel_size: int) -> None:
    """Refuse a backend that cannot serve this model. Nothing is looked at for the native one.

    Args:
        model: resolved.
        tensor_parallel_size: of the rollout layout.

    Raises:
        ConfigError, DependencyError: it cannot.
    """
    if rollout.rollout_backend != "sglang":
        if rollout.sglang_python is not None:
            raise ConfigError(
                "--sglang-python is of use with --rollout-backend sglang only. Give both, or leave it out."
            )
        return
    if not 0 < rollout.sglang_mem_fraction_static < 1:
        raise ConfigError(
            f"--sglang-mem-fraction-static is {rollout.sglang_mem_fraction_static}. Use a share above 0 and below 1."
        )
    if rollout.verify_refit:
        raise ConfigError(
            "--verify-refit compares weights within the training processes, and SGLang's are not there. Leave it out."
        )
    if (rollout.rollout_expert_model_parallel_size or 1) > 1:
        raise ConfigError(
            f"--rollout-expert-model-parallel-size {rollout.rollout_expert_model_parallel_size} does not work with "
            "--rollout-backend sglang, whose replicas hold all experts. Leave it out, or use 1."
        )
    check_model(model, rollout.rollout_block_size or model.block_size)
    if model.num_attention_heads % tensor_parallel_size:
        raise ConfigError(
            f"SGLang cannot divide the {model.num_attention_heads} attention heads of this model among "
            f"{tensor_parallel_size} tensor-parallel ranks. Use a rollout tensor-parallel size that divides them."
        )
    check_interpreter(rollout.sglang_python)


def check_model(model: ModelConfig, block_size: int | None) -> Family:
    """The family as which SGLang serves a model.

    Raises:
        ConfigError: there is none.
    """
    if model.fp64:
        raise ConfigError("--rollout-backend sglang does not compute in float64. Leave out --fp64, or use native.")
    if model.full_attention or model.logit_shift:
        what = "full attention" if model.full_attention else "logits ahead of their token (--logit-shift 1)"
        raise ConfigError(f"SGLang serves no model with {what}. Use --rollout-backend native.")
    if block_size is None or block_size < 2:
        raise ConfigError(
            f"--rollout-backend sglang decodes in blocks of 2 tokens or more, and the block size is {block_size}. Give "
            "--rollout-block-size, or use --rollout-backend native."
        )
    reasons = []
    for name in SERVED:
        family = FAMILIES[name]
        if {stored.key for stored in whole_model(model)} - family.table.keys():
            continue
        try:
            check_described(family, model, model_config(family, model))
        except (ConfigError, TypeError) as error:
            reasons.append(str(error))
            continue
        return family
    why = f" ({reasons[0].rstrip('.')})" if reasons else ""
    raise ConfigError(
        f"SGLang serves models of the families {', '.join(SERVED)}, and this is none of them{why}. Use "
        "--rollout-backend native."
    )


def model_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """config.json of a model as SGLang reads it.

    Raises:
        TypeError: the family has no words for this model.
    """
    return family.write(model) | {"architectures": [family.architecture]}


def check_interpreter(python: str | None) -> Interpreter:
    """Ask another interpreter whether it has SGLang.

    Raises:
        ConfigError: no interpreter, or it does not answer.
        DependencyError: it has no SGLang, or an old one.
    """
    if python is None:
        raise ConfigError("--sglang-python is not set. Give the python of the environment that SGLang is installed in.")
    if not (os.path.isfile(python) and os.access(python, os.X_OK)):
        raise ConfigError(f"--sglang-python {python} is no program that can be run. Give the path of a python.")
    found = _ask(os.path.abspath(python))  # it is asked from another folder
    if found.sglang is None:
        raise DependencyError(
            f"--sglang-python {python} has no SGLang. Install sglang>={_NEEDED} in its environment, or give another."
        )
    if parse_version(found.sglang) < OLDEST:
        raise DependencyError(
            f"--sglang-python {python} has SGLang {found.sglang}, which is too old. Install sglang>={_NEEDED} there."
        )
    return found


def _ask(python: str) -> Interpreter:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        answer = subprocess.run(
            [python, "-c", _PROBE], env=kept, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, cwd="/"
        )
        found = json.loads(answer.stdout)
        return Interpreter(tuple(found["python"]), found["sglang"], found["torch"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--sglang-python {python} does not run Python programs. Give the path of an environment's python."
        ) from None


def dtype_name(model: ModelConfig) -> str:
    """SGLang's name for the type in which a model is kept."""
    return str(torch.bfloat16 if model.bf16 else torch.float32).removeprefix("torch.")
