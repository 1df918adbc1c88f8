"""Places that cannot be written to, and packages that are not there."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad, folder_at

WANDB = "--wandb-project p"
NOBODY = {"HOME": ".", "WANDB_API_KEY": "", "NETRC": "netrc", "WANDB_CONFIG_DIR": ".", "WANDB_MODE": "online"}

ENTRIES = [
    Bad("a file in the place of --save", "sft", "--save sft.jsonl", "--save sft.jsonl"),
    Bad("--save below a file", "sft", "--save sft.jsonl/x", "--save sft.jsonl/x"),
    Bad("--save below a device", "tracerl", "--save /dev/null/x", "--save /dev/null/x"),
    Bad("--save in /proc", "sft", "--save /proc/x", "--save /proc/x"),
    Bad("a folder in the place of config.yaml", "sft", "", "--save out", write=folder_at("out/config.yaml")),
    Bad("a name beyond the limit", "sft", "--save " + "x" * 300, "--save xxx"),
    Bad("metrics into a folder", "evaluate", "--metrics-jsonl out", "--metrics-jsonl out"),
    Bad("metrics below a file", "sft", "--metrics-jsonl sft.jsonl/x", "--metrics-jsonl sft.jsonl/x"),
    Bad("an empty name for metrics", "evaluate", "--metrics-jsonl ''", "--metrics-jsonl"),
    Bad(
        "rollouts into a file", "tracerl", "--save-debug-rollout-data sft.jsonl", "--save-debug-rollout-data sft.jsonl"
    ),
    Bad("traces below a file", "sft", "--profile --profile-dir sft.jsonl/x", "--profile-dir sft.jsonl/x"),
    Bad("traces without a place", "generate", "--profile", "Give --profile-dir."),
    Bad("snapshots into a file", "evaluate", "--memory-snapshot-dir sft.jsonl", "--memory-snapshot-dir sft.jsonl"),
    Bad("traces of no step", "sft", "--profile --profile-step-end 10", ("--profile-step-end 10", "larger")),
    Bad(
        "traces of a rank that is not there", "sft", "--profile --profile-ranks 0 3", ("--profile-ranks has 3", "to 0")
    ),
    Bad("traces of a negative rank", "tracerl", "--profile-ranks -1", "--profile-ranks is -1"),
    Bad(
        "traces of a phase that fine-tuning lacks",
        "sft",
        "--profile --profile-dir x --profile-phases train rollout",
        ("--profile-phases names rollout", "only train."),
    ),
    Bad(
        "traces of a value model that is not there",
        "tracerl",
        "--profile --profile-dir x --profile-phases train_value",
        ("names train_value", "rollout, reward"),
    ),
    Bad("traces of no pass", "tracerl", "--profile-passes 0", "--profile-passes is 0"),
    Bad("NVTX ranges without a GPU", "sft", "--nvtx-ranges", "--nvtx-ranges"),
    Bad("wandb into a file", "sft", f"{WANDB} --wandb-save-dir sft.jsonl", "--wandb-save-dir sft.jsonl"),
    Bad("wandb without a login", "sft", WANDB, ("--wandb-project p", "wandb login"), environment=NOBODY),
    # ---- packages
    Bad(
        "no tensorboard",
        "sft",
        "--tensorboard-dir tb",
        ("tensorboard", "pip install"),
        kind="DependencyError",
        absent=("tensorboard", "torch.utils.tensorboard"),
    ),
    Bad("no wandb", "sft", WANDB, ("wandb", "pip install"), kind="DependencyError", absent=("wandb",)),
    Bad(
        "no wandb for an evaluation",
        "evaluate",
        WANDB,
        ("wandb", "pip install"),
        kind="DependencyError",
        absent=("wandb",),
    ),
    Bad(
        "no DALI",
        "sft",
        "--dataloader-type dali",
        ("--dataloader-type dali", "pip install nvidia-dali"),
        kind="DependencyError",
        absent=("nvidia.dali",),
    ),
    Bad(
        "no reasoning_gym",
        "tracerl",
        "--prompt-data reasoning_gym:chain_sum",
        ("reasoning-gym", "pip install"),
        kind="DependencyError",
        absent=("reasoning_gym",),
    ),
    Bad(
        "no math_verify", "tracerl", "", ("math-verify", "pip install"), kind="DependencyError", absent=("math_verify",)
    ),
    Bad(
        "no math_verify for an evaluation",
        "evaluate",
        "",
        ("math-verify", "pip install"),
        kind="DependencyError",
        absent=("math_verify",),
    ),
    Bad(
        "no transformers", "sft", "", ("transformers", "pip install"), kind="DependencyError", absent=("transformers",)
    ),
]
