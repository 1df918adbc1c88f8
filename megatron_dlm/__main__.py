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
    "trace": "step maps of given responses: the order in which the model prefers to unmask them",
    "curriculum": "stages of these one after the other, from one description",
    "preprocess": "token ids of training data, indexed on the disk for runs that read much of it",
    "plan": "memory and time of a run on devices that are not here, rank by rank",
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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: no traces of what is told here
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
        return _leave(error)
    except Interrupted as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        if _rank() == 0:
            print("\nInterrupted. What was saved can be resumed with --load.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_listens():
            return 128 + signal.SIGPIPE
        told = _shortage(error) or _of_others(error)
        if told is None:
            _note(error)
            raise
        return _leave(told)
    return 0


def _leave(error: UserError) -> int:
    """Tell an error, here and to other hosts; returns the exit code."""
    if _is_speaker():
        _tell(error)
        _note(error)
    else:  # which may be ended before it speaks
        _note(error)
        _tell(error)
    return error.code


def _note(error: Exception) -> None:
    """Leave word for the processes on other hosts; there is nobody to hear in a job of one."""
    if _several_hosts():
        from megatron_dlm.parallel import meeting

        meeting.leave_note(error)
        meeting.stop_watching()


def _of_others(error: BaseException) -> UserError | None:
    """What an error says about other processes of the job, when they have gone."""
    meeting = sys.modules.get("megatron_dlm.parallel.meeting")
    return meeting and meeting.explain(error)


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


def _rank(name: str = "RANK") -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else 0


def _is_speaker() -> bool:
    return _rank("LOCAL_RANK" if _several_hosts() else "RANK") == 0  # each host has a terminal


def _several_hosts() -> bool:
    return 0 < _rank("LOCAL_WORLD_SIZE") < _rank("WORLD_SIZE")


def _tell(error: UserError) -> None:
    """One sentence, once per job: rank 0 speaks. What only another rank has found it says itself, unless the launcher
    ends it first."""
    rank = _rank()
    if error.told:
        return
    if not _is_speaker():
        time.sleep(SECONDS_FOR_RANK_0)
    sys.stdout.flush()
    message = " ".join(str(error).split("\n"))  # a value may hold a line break
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    rank = rank if error.rank is None else error.rank
    where = f" on {error.host}" if error.host else ""
    print(f"{type(error).__name__}: {message}{f' (rank {rank}{where})' if rank or where else ''}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
