"""What an entry of the table says, and the valid command lines that it spoils.

Every entry runs in a folder of its own, which is its working directory and holds a small world in which the base
command lines are valid (`make_world`):

    tokenizer/       a tokenizer with a mask, a stop token, and no chat template
    sft.jsonl        samples for fine-tuning
    prompts.jsonl    prompts with answers
    indexed.*        what `preprocess` made of sft.jsonl
    ckpt/            what `sft` wrote after 2 iterations, optimizer included
    rl/              what `tracerl` wrote after 1 RL step, from ckpt
    out/             a copy of ckpt: the work of an earlier run, where the base command lines write to
    metrics.jsonl    lines of an earlier run, to which they append
    responses.jsonl  what `generate` wrote with ckpt, some of them ending within a block
    scored.jsonl     a file of an earlier run
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --block-size 4 "
    "--max-position-embeddings 128 --init-method-std 0.2 --rotary-base 10000 --tokenizer-model tokenizer "
)
SFT = MODEL + "--data-path sft.jsonl --train-iters 3 --global-batch-size 4 --metrics-jsonl metrics.jsonl "
LENGTHS = "--rollout-max-prompt-len 32 --rollout-max-response-len 8 "
BASES = {
    "sft": "sft " + SFT + "--save out",
    "resume": "sft " + SFT + "--load ckpt --save ckpt",
    "tracerl": "tracerl " + MODEL + LENGTHS + "--load ckpt --finetune --prompt-data prompts.jsonl --num-rollout 1 "
    "--rollout-batch-size 2 --n-samples-per-prompt 2 --num-steps-per-rollout 1 --reward-workers 1 --save out "
    "--metrics-jsonl metrics.jsonl",
    "resume-rl": "tracerl " + MODEL + LENGTHS + "--load rl --prompt-data prompts.jsonl --num-rollout 2 "
    "--rollout-batch-size 2 --n-samples-per-prompt 2 --num-steps-per-rollout 1 --reward-workers 1 --save rl",
    "evaluate": "evaluate " + MODEL + LENGTHS + "--load ckpt --eval-prompt-data prompts.jsonl --eval-num-prompts 2 "
    "--reward-workers 1 --metrics-jsonl metrics.jsonl",
    "generate": "generate --load ckpt --prompts prompts.jsonl --output scored.jsonl --max-new-tokens 8",
    "score": "score --load ckpt --input responses.jsonl --output scored.jsonl",
    "sft-indexed": "sft " + SFT.replace("sft.jsonl", "indexed") + "--save out",
    "preprocess": "preprocess --input sft.jsonl --output new --tokenizer-model tokenizer --workers 1",
    "trace": "trace --load ckpt --input sft.jsonl --output traced.jsonl",
}
"""Name -> a command line that is valid as it stands (test_bad_inputs.py runs each)."""


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Attributes:
        id: a few words, unique in the table.
        base: the command line that is spoiled (BASES), or a whole one of its own.
        flags: what is added to it; of a flag given twice the last one counts.
        says: words that the message must contain: what is wrong, with its value.
        without: flags that are left out, with their values.
        write: spoils the files of the world; called with its folder.
        kind: the kind of error.
        absent: packages that are not installed.
        environment: variables set for the run.
        ranks: number of processes of the job.
        late: whether it cannot be known before the work has begun. What was there before must still be left alone.
    """

    id: str
    base: str
    flags: str = ""
    says: str | tuple[str, ...] = ()
    without: str = ""
    write: Callable[[Path], object] | None = None
    kind: str = "ConfigError"
    absent: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    late: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        return (self.says,) if isinstance(self.says, str) else self.says

    def argv(self) -> list[str]:
        base = shlex.split(BASES.get(self.base, self.base))
        return leave_out(base, self.without.split()) + shlex.split(self.flags)


def leave_out(argv: list[str], flags: list[str]) -> list[str]:
    """A command line without some of its flags and their values."""
    for flag in flags:
        start = argv.index(flag)
        end = next((i for i in range(start + 1, len(argv)) if argv[i].startswith("--")), len(argv))
        argv = argv[:start] + argv[end:]
    return argv


# ---- what `write` may be


def text(name: str, content: str) -> Callable[[Path], object]:
    """The file `name` with this content instead of its own."""
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def binary(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def line(name: str, record: object) -> Callable[[Path], object]:
    """The file `name` with one more line, in the middle, which is this record."""

    def write(folder: Path) -> None:
        before = (folder / name).read_text().splitlines()
        before.insert(2, record if isinstance(record, str) else json.dumps(record))
        (folder / name).write_text("\n".join(before) + "\n", encoding="utf-8")

    return write


def edit_json(name: str, **changes: object) -> Callable[[Path], object]:
    """A JSON file with other values for some keys; None takes a key out."""

    def write(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return write


def edit_line(name: str, number: int = 3, **changes: object) -> Callable[[Path], object]:
    """A line of JSON, counted from 1, with other values for some fields; None takes a field out."""

    def write(folder: Path) -> None:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[number - 1]) | changes
        lines[number - 1] = json.dumps({key: value for key, value in record.items() if value is not None})
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def remove(pattern: str) -> Callable[[Path], object]:
    """Nothing at these paths."""

    def write(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return write


def truncate(pattern: str, keep: float = 0.5) -> Callable[[Path], object]:
    """Files cut short."""

    def write(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            content = path.read_bytes()
            path.write_bytes(content[: int(len(content) * keep)])

    return write


def cut_gzip(name: str, content: str) -> Callable[[Path], object]:
    """A gzip file whose end is missing."""
    return lambda folder: (folder / name).write_bytes(gzip.compress(content.encode())[:-12])


def folder_at(name: str) -> Callable[[Path], object]:
    """An empty folder in the place of whatever is there."""

    def write(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).mkdir(parents=True)

    return write


def all_of(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [step(folder) for step in steps]


# ---- what is held of every message


ADVICE = (
    "Add Check Choose Complete Correct Delete Export Free Give Leave Lower Make Name Put Raise Remove Run Save See Set "
    "Shorten Start Swap Switch Take Use Write"
).split()


def tells_what_to_do(message: str) -> bool:
    """Whether its last sentence begins with an imperative, asks `Did you mean ...?`, or says what is needed."""
    last = re.split(r"(?<=[.?!]) (?=[A-Z-])", message)[-1]
    needed = re.fullmatch(r"\S+( in \S+)? needs .+, not .+", message)
    return (
        last.startswith("Did you mean ")
        or last.partition(" ")[0].rstrip(":,") in ADVICE
        or needed is not None
        or " must be " in last
    )


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


APPENDED = re.compile(r"(.*/)?(metrics|samples)\.jsonl|(out|ckpt|rl)/(latest.*|curves\.png|config\.yaml)")


def lost(before: Mapping[str, str], after: Mapping[str, str], late: bool) -> list[str]:
    """Files that are gone or have changed; those that every run appends to or moves on may, once it has begun."""
    return [name for name in before if after.get(name) != before[name] and not (late and APPENDED.fullmatch(name))]


def make_world(folder: Path, run: Callable[..., None]) -> None:
    """Fill a folder as the docstring above says. `run(argv, folder)` runs a command there."""
    from megatron_dlm.data.train_tokenizer import train_tokenizer

    pairs = [(a, b) for a in range(5) for b in range(5)]
    sft = [{"question": f"{a}+{b}=", "response": f"\\boxed{{{a + b}}}"} for a, b in pairs]
    prompts = [{"question": f"{a}+{b}=", "ground_truth_answer": str(a + b)} for a, b in pairs]
    (folder / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sft))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    words = [record["question"] + record["response"] for record in sft]
    train_tokenizer(words, 270, folder / "tokenizer", ["\\boxed{", "}"])
    run(shlex.split("sft " + SFT + "--save ckpt --train-iters 2 --metrics-jsonl sft-metrics.jsonl"), folder)
    run(leave_out(shlex.split(BASES["tracerl"]), ["--metrics-jsonl"]) + ["--save", "rl"], folder)
    run(shlex.split(BASES["generate"]) + ["--output", "responses.jsonl", "--max-new-tokens", "6"], folder)
    run(shlex.split(BASES["preprocess"]) + ["--output", "indexed"], folder)
    (folder / "scored.jsonl").write_text('{"old": 1}\n')
    shutil.copytree(folder / "ckpt", folder / "out")
