"""Settings of `preprocess` that cannot work, refused before a file is read. The rules are those of `validate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.preprocess import PreprocessConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate import at_least, needs_data

ENDINGS = (".bin", ".idx", ".json", ".jsonl")


def check_preprocess(settings: PreprocessConfig, words: TokenizerConfig, environment: Mapping[str, str]) -> None:
    """Refuse settings that name no data, no tokenizer or no place, and the processes of a launcher."""
    needs_data(settings.input, "--input", "file")
    for name, given in (("--output", settings.output), ("--tokenizer-model", words.tokenizer_model)):
        if given is None:
            raise ConfigError(f"preprocess needs {name}. Add it.")
    for ending in ENDINGS:
        if settings.output.endswith(ending):
            raise ConfigError(
                f"--output {settings.output} is a prefix, to which .bin, .idx and .json are added. Leave {ending} out."
            )
    path, times = Counter(settings.input).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"--input names {path} {times} times. Name it once, and give its share in a run by --data-weights."
        )
    at_least(settings, 1, "workers", "seq_length", "chunk_bytes")
    if environment.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"preprocess is one process, which starts others itself, and WORLD_SIZE is {environment['WORLD_SIZE']}. "
            "Start it without torchrun, and use --workers."
        )
