"""Checkpoints that are missing, damaged, or of another model, stage or optimizer."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.platform.megatron import COMMON
from tests.bad_inputs.bench import Bad, all_of, binary, folder_at, remove, text, truncate
from tests.common_state import COMMON_IS_A_FILE, change_common_state

LATEST = "ckpt/latest_checkpointed_iteration.txt"
HERE = "ckpt/iter_0000002"


def _ckpt(id: str, write, says: str | tuple[str, ...], base: str = "resume", flags: str = "") -> Bad:
    return Bad(id, base, flags, says, write=write, kind="CheckpointError")


def _in_all(id: str, write, says: str | tuple[str, ...]) -> list[Bad]:
    """The same damage, met by each command that reads ckpt."""
    return [_ckpt(f"{id} ({base})", write, says, base) for base in ("resume", "tracerl", "evaluate")]


def _megatron_folder(folder: Path) -> None:
    """What Megatron-LM's older format looks like."""
    remove("ckpt")(folder)
    (folder / HERE / "mp_rank_00").mkdir(parents=True)
    (folder / HERE / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    (folder / LATEST).write_text("2")


def _without_run(folder: Path) -> None:
    """A distributed checkpoint that another program wrote."""
    change_common_state(folder / HERE, lambda common: common.pop("run"))


ENTRIES = [
    *_in_all("no such checkpoint folder", remove("ckpt"), ("ckpt", "--save")),
    *_in_all("an empty checkpoint folder", folder_at("ckpt"), ("ckpt", "latest_checkpointed_iteration.txt")),
    *_in_all("a truncated weight file", truncate(f"{HERE}/*.distcp", 0.02), (HERE, "damaged")),
    *_in_all("a truncated common.pt", binary(f"{HERE}/{COMMON}", b"PK\3\4"), (HERE, "damaged")),
    *(_in_all("no common.pt", remove(f"{HERE}/{COMMON}"), (HERE, "damaged")) if COMMON_IS_A_FILE else []),
    *_in_all("an empty weight file", truncate(f"{HERE}/*.distcp", 0), (HERE, "damaged")),
    _ckpt("a file as a checkpoint", remove("nothing"), "sft.jsonl", flags="--load sft.jsonl"),
    _ckpt("a random folder", remove("nothing"), "tokenizer", flags="--load tokenizer"),
    _ckpt("the folder of one iteration", remove("nothing"), HERE, flags=f"--load {HERE}"),
    _ckpt("no latest file", remove(LATEST), ("ckpt", "latest_checkpointed_iteration.txt")),
    _ckpt("an empty latest file", text(LATEST, ""), LATEST),
    _ckpt("garbage in the latest file", text(LATEST, "two\n"), LATEST),
    _ckpt("bytes in the latest file", binary(LATEST, b"\xff\xfe2"), LATEST),
    _ckpt("a negative iteration", text(LATEST, "-2"), LATEST),
    _ckpt("the release of Megatron-LM", text(LATEST, "release"), LATEST),
    _ckpt("a folder as the latest file", folder_at(LATEST), LATEST),
    _ckpt("an iteration that is not there", text(LATEST, "7"), "iter_0000007"),
    _ckpt("no iteration folder", remove(HERE), HERE),
    _ckpt("no weight files", remove(f"{HERE}/*.distcp"), (HERE, "damaged")),
    _ckpt("no .metadata", remove(f"{HERE}/.metadata"), (HERE, "damaged")),
    _ckpt("a truncated .metadata", truncate(f"{HERE}/.metadata"), (HERE, "damaged")),
    _ckpt("no metadata.json", remove(f"{HERE}/metadata.json"), HERE),
    _ckpt("garbage in metadata.json", text(f"{HERE}/metadata.json", "{"), HERE),
    *(  # newer releases know one format alone, and do not ask
        [_ckpt("another format in metadata.json", text(f"{HERE}/metadata.json", '{"sharded_backend": "zarr"}'), HERE)]
        if COMMON_IS_A_FILE
        else []
    ),
    _ckpt("a list in metadata.json", text(f"{HERE}/metadata.json", "[]"), HERE),
    _ckpt("garbage in common.pt", binary(f"{HERE}/{COMMON}", b"not a pickle"), (HERE, "damaged")),
    _ckpt("garbage in a weight file", binary(f"{HERE}/__0_0.distcp", b"x" * 100000), (HERE, "damaged")),
    _ckpt("an old Megatron-LM folder", _megatron_folder, HERE),
    _ckpt("a checkpoint of another program", _without_run, "Megatron-LM"),
    # ---- not this run
    _ckpt("more layers", None, ("--num-layers 2", "4"), flags="--num-layers 4"),
    _ckpt("another width", None, ("--hidden-size 32", "64"), "tracerl", "--hidden-size 64"),
    _ckpt("other feed-forward layers", None, ("--ffn-hidden-size 64", "128"), "evaluate", "--ffn-hidden-size 128"),
    _ckpt("another block size", None, ("--block-size 4", "8", "--finetune"), flags="--block-size 8"),
    _ckpt("another block size to evaluate", None, ("--block-size 4", "8"), "evaluate", "--block-size 8"),
    _ckpt("another vocabulary", None, "--vocab-size", flags="--vocab-size 300"),
    _ckpt("another rotary base", None, ("--rotary-base 10000", "500000"), "evaluate", "--rotary-base 500000"),
    _ckpt("experts that were not there", None, "--num-experts", flags="--num-experts 4 --moe-router-topk 2"),
    _ckpt(
        "another preset",
        None,
        ("--num-layers 2", "4"),
        "evaluate --model-preset tiny --load ckpt --tokenizer-model tokenizer --eval-prompt-data prompts.jsonl",
    ),
    _ckpt(
        "an override that changes the function",
        None,
        "add_bias_linear",
        flags="--transformer-override add_bias_linear=true",
    ),
    _ckpt("another optimizer", None, ("adam", "sgd", "--no-load-optim"), flags="--optimizer sgd"),
    _ckpt("a distributed optimizer", None, ("distributed", "--no-load-optim"), flags="--use-distributed-optimizer"),
    _ckpt("another precision", None, ("mixed", "--no-load-optim"), flags="--bf16"),
    Bad(
        "a mask that begins as several tokens",
        "resume",
        "--finetune --mask-embedding-init 7+7",
        ("--mask-embedding-init 7+7", "3 tokens"),
    ),
    Bad(
        "a start for the mask of weights that are drawn",
        "sft",
        "--mask-embedding-init mean",
        ("--mask-embedding-init mean", "--hf-checkpoint"),
    ),
    Bad("another stage", "tracerl", "", ("sft", "tracerl", "--finetune"), "--finetune"),
    Bad("a stage back", "resume", "--load rl", ("tracerl", "sft", "--finetune")),
    *(
        _ckpt(f"the {what} folder of an earlier run is damaged", all_of(truncate(pattern)), folder, base)
        for what, folder, pattern, base in (("rl", "rl/iter_0000001", "rl/iter_0000001/*.distcp", "resume-rl"),)
    ),
]
