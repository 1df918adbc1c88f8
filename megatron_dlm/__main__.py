"""`python -m megatron_dlm COMMAND ...` and the console script `megatron-dlm`."""

from __future__ import annotations

import errno
import importlib
import os
import select
import signal
import sys
import time

from megatron_dlm.config.errors import ConfigError, Interrupted, ResourceError, UserError
from megatron_dlm.config.fields import suggest

COMMANDS = {
    "sft": "supervised fine-tuning on prompts and responses",
    "tracerl": "trajectory-aware reinforcement learning on prompts with verifiable answers",
    "evaluate": "accuracy, length and speed on held-out prompts",
    "generate": "responses to the prompts of a file, with token ids, step maps and log-probabilities",
    "score": "log-probabilities of given responses under the training model",
    "convert": "HuggingFace checkpoints in and out, and their comparison",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = ("OutOfMemoryError", "can't allocate memory")  # torch's, on a device and on the host
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
    except Interrupted as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        if _rank() == 0:
            print("\nInterrupted. What was saved can be resumed with --load.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_listens():
            return 128 + signal.SIGPIPE
        shortage = _shortage(error)
        if shortage is None:
            raise
        _tell(shortage)
        return 2
    return 0


def _shortage(error: BaseException) -> ResourceError | None:
    """What an error says about the machine, when that has run out of something; the libraries wrap it in others."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            what = f" to write {error.filename}" if error.filename else ""
            return ResourceError(f"No room is left{what} ({error.strerror}). Make room, and go on from what was saved.")
        if isinstance(error, MemoryError) or any(words in f"{type(error).__name__} {error}" for words in NO_MEMORY):
            reason = " ".join(str(error).split())[:150] or "Python has none left"
            shortage = ResourceError(
                f"There is not enough memory ({reason}). Use a smaller model, shorter rows or more processes."
            )
            for note in getattr(error, "__notes__", ()):  # who held what (training/ledger.py)
                shortage.add_note(note)
            return shortage
        pending += [error.__cause__, error.__context__]
    return None


def _nobody_listens() -> bool:
    """Whether what reads our standard output has gone (`| head`); the rest of the output then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _rank() -> int:
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else 0


def _tell(error: UserError) -> None:
    """One sentence, once per job: rank 0 speaks. What only another rank has found it says itself, unless the launcher
    ends it first."""
    rank = _rank()
    if error.told:
        return
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    sys.stdout.flush()
    message = " ".join(str(error).split("\n"))  # a value may hold a line break
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    print(f"{type(error).__name__}: {message}{f' (rank {rank})' if rank else ''}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
