"""The models beside the policy of RL: value model, reference, teacher; and objectives that contradict themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_dlm.platform.megatron import COMMON
from tests.bad_inputs.bench import Bad, all_of, binary, remove, truncate
from tests.common_state import change_common_state

TEACHER, REFERENCE, VALUE = "--rl-method opd --teacher-load", "--kl-reference frozen --ref-load", "--use-value-model"
HERE = "other/iter_0000002"
NO_FOLDER = ("There is no checkpoint folder nowhere",)
NO_CHECKPOINT = ("tokenizer holds no finished checkpoint",)


def _other(folder: Path) -> None:
    """A copy of ckpt."""
    shutil.copytree(folder / "ckpt", folder / "other")


def _other_words(folder: Path) -> None:
    """A copy of ckpt whose tokenizer has the same tokens under other ids."""
    _other(folder)
    path = folder / HERE / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    added = {token["content"] for token in content["added_tokens"]}
    words = {word: number for word, number in content["model"]["vocab"].items() if word not in added}
    content["model"]["vocab"] |= dict(zip(words, reversed(words.values())))
    path.write_text(json.dumps(content))


def _other_run(**changes: object):
    """A copy of ckpt whose record of its model has other values; or that is said to be a value model."""

    def write(folder: Path) -> None:
        _other(folder)
        change_common_state(folder / HERE, change)

    def change(common: dict) -> None:
        run = json.loads(common["run"])
        run["extra"]["model"].update(changes)
        run["extra"]["value_model"] = not changes
        common["run"] = json.dumps(run)

    return write


def _beside(id: str, name: str, says: str | tuple[str, ...], write=None, kind: str = "CheckpointError") -> list[Bad]:
    """The same mistake with the folder of a reference and of a teacher."""
    words = (says,) if isinstance(says, str) else says
    return [
        Bad(f"{id} ({flag})", "tracerl", f"{flags} {name}", (*words, flag), write=write, kind=kind)
        for flags, flag in ((TEACHER, "--teacher-load"), (REFERENCE, "--ref-load"))
    ]


def _flags(id: str, flags: str, says: str | tuple[str, ...]) -> Bad:
    return Bad(id, "tracerl", flags, says)


def _hf(**fields: object):
    """A HuggingFace folder with this config.json and nothing else."""
    return lambda folder: ((folder / "hf").mkdir(), (folder / "hf/config.json").write_text(json.dumps(fields)))


ENTRIES = [
    # ---- folders
    *_beside("no such folder", "nowhere", NO_FOLDER),
    *_beside("a file", "sft.jsonl", "sft.jsonl"),
    *_beside("a folder without a checkpoint", "tokenizer", NO_CHECKPOINT),
    *_beside("the folder of one iteration", "ckpt/iter_0000002", "ckpt/iter_0000002 holds no finished checkpoint"),
    *_beside("a value model", "other", "other holds a value model, not a policy", _other_run()),
    *_beside("other words", "other", ("other has another tokenizer", "ids"), _other_words, "ConfigError"),
    *(
        Bad(f"{id} ({flags.split()[-1]})", "tracerl", f"{flags} other", HERE, write=write, kind="CheckpointError")
        for flags in (TEACHER, REFERENCE)
        for id, write in (
            ("damaged weights", all_of(_other, truncate(f"{HERE}/*.distcp", 0.02))),
            ("a damaged record", all_of(_other, binary(f"{HERE}/{COMMON}", b"PK\3\4"))),
            ("no weights", all_of(_other, remove(f"{HERE}/*.distcp"))),
        )
    ),
    Bad(
        "a teacher of another vocabulary",
        "tracerl",
        f"{TEACHER} other",
        ("--teacher-load other has 300 tokens", "has 259"),
        write=_other_run(vocab_size=300),
    ),
    Bad(
        "a reference of another vocabulary",
        "tracerl",
        f"{REFERENCE} other",
        ("--ref-load other", "--vocab-size 300"),
        write=_other_run(vocab_size=300),
        kind="CheckpointError",
    ),
    Bad(
        "a reference of another width",
        "tracerl",
        f"{REFERENCE} other",
        ("--ref-load other", "--hidden-size 64"),
        write=_other_run(hidden_size=64),
        kind="CheckpointError",
    ),
    Bad(
        "a teacher that cannot be split",
        "tracerl",
        f"{TEACHER} other --pipeline-model-parallel-size 2",
        ("--teacher-load other does not fit this run", "--pipeline-model-parallel-size 2"),
        write=_other_run(num_layers=3),
        ranks=2,
    ),
    Bad(
        "a teacher in a broken HuggingFace folder",
        "tracerl",
        f"{TEACHER} hf",
        "hf/config.json",
        write=_hf(),
        kind="CheckpointError",
    ),
    # ---- the value model
    Bad("no such value model", "tracerl", f"{VALUE} --value-load nowhere", NO_FOLDER, kind="CheckpointError"),
    Bad("a file of values", "tracerl", f"{VALUE} --value-load sft.jsonl", "sft.jsonl", kind="CheckpointError"),
    Bad(
        "no checkpoint of a value model",
        "tracerl",
        f"{VALUE} --value-load tokenizer",
        (*NO_CHECKPOINT, "--value-load"),
        kind="CheckpointError",
    ),
    Bad(
        "a policy as a value model",
        "tracerl",
        f"{VALUE} --value-load ckpt",
        "--value-load ckpt holds a policy",
        kind="CheckpointError",
    ),
    Bad(
        "a value model as the policy",
        "tracerl",
        "--load other",
        "holds a value model",
        write=_other_run(),
        kind="CheckpointError",
    ),
    _flags("a discount without a value model", "--gamma 0.5", ("--gamma 0.5", VALUE)),
    _flags("values to load and none to learn", "--value-load ckpt", ("--value-load ckpt", VALUE)),
    _flags("a discount above one", f"{VALUE} --gamma 1.5", "--gamma is 1.5"),
    _flags("no value steps", f"{VALUE} --value-interval 0", "--value-interval is 0"),
    _flags("a warm-up of values alone", f"{VALUE} --value-warmup-steps 1", "--value-warmup-steps 1"),
    _flags("a value schedule of warm-up", f"{VALUE} --value-lr-warmup-iters 1", "--value-lr-warmup-iters 1"),
    _flags("a value rate below its end", f"{VALUE} --value-lr 1e-6 --value-min-lr 1e-5", "--value-min-lr 1e-05"),
    _flags("values of drawn masks", f"{VALUE} --rl-method espo", (VALUE, "--rl-method espo", "tracerl or dipo")),
    # ---- objectives
    _flags("distillation without a teacher", "--rl-method opd", ("--rl-method opd", "--teacher-load")),
    _flags("a weight without a teacher", "--distill-coef 1", ("--distill-coef 1", "--teacher-load")),
    _flags("a teacher nobody listens to", "--teacher-load ckpt", ("--teacher-load", "--distill-coef")),
    _flags("a frozen reference that is not given", "--kl-reference frozen", ("--kl-reference frozen", "--ref-load")),
    _flags("a reference nobody holds on to", "--ref-load ckpt", ("--ref-load", "--kl-reference frozen")),
    _flags(
        "a reference of no weight", f"{REFERENCE} ckpt --kl-loss-coef 0", ("--kl-reference frozen", "--kl-loss-coef")
    ),
    _flags("nothing to learn", "--policy-loss-coef 0", ("--policy-loss-coef 0", "--distill-coef")),
    _flags("slices of whole responses", "--rl-method espo --loss-aggregation slice", ("slice", "--rl-method espo")),
    _flags("weights of whole responses", "--rl-method slim_rl --use-tis", ("--use-tis", "tracerl or dipo")),
    _flags("masks of a trace", "--mask-ratio-high 0.5", ("--mask-ratio-high", "--rl-method tracerl")),
    _flags("shrunk masks", "--rl-method coupled --shrinkage 2", ("--shrinkage", "--rl-method coupled")),
    _flags(
        "mask ratios that are swapped", "--rl-method coupled --mask-ratio-low 0.95", ("--mask-ratio-low 0.95", "Swap")
    ),
    _flags("a dual clip below one", "--eps-clip-c 0.5", "--eps-clip-c is 0.5"),
    _flags("rollout probabilities of drawn masks", "--rl-method ebpo --old-logprobs rollout", "--rl-method ebpo"),
]
