"""`python -m megatron_dlm COMMAND ...` and the console script `megatron-dlm`."""

from __future__ import annotations

import importlib
import os
import sys
import time

from megatron_dlm.config.errors import ConfigError, UserError
from megatron_dlm.config.fields import suggest

COMMANDS = {
    "sft": "supervised fine-tuning on prompts and responses",
    "tracerl": "trajectory-aware reinforcement learning on prompts with verifiable answers",
    "evaluate": "accuracy, length and speed on held-out prompts",
}
SECONDS_FOR_RANK_0 = 5.0  # a launcher ends all ranks soon after the first has left


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: megatron-dlm COMMAND [--config FILE.yaml] [flags]", "", "commands:"]
    return "\n".join(
        lines
        + [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
        + ["", "megatron-dlm COMMAND --help lists its flags."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 2 after a user's mistake, told in one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise ConfigError(
                f"There is no command {argv[0]!r}. "
                f"{suggest(argv[0], COMMANDS, 'Use one of: ' + ', '.join(COMMANDS) + '.')}"
            )
        importlib.import_module(f"megatron_dlm.commands.{argv[0]}").main(argv[1:])
    except UserError as error:
        _tell(error)
        return 2
    return 0


def _tell(error: UserError) -> None:
    """One sentence, once per job: rank 0 speaks. What only another rank has found it says itself, unless the launcher
    ends it first."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    sys.stdout.flush()
    print(f"{type(error).__name__}: {error}{f' (rank {rank})' if rank else ''}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
