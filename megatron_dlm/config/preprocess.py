"""Indexing of training data: from which files, to where, and by how many processes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class PreprocessConfig:
    """Token ids of JSONL files, in the format of megatron-core's IndexedDataset."""

    input: list[str] = field(default_factory=list)
    """JSONL files, also compressed (.gz), with question, prompt or messages and response, with text, or with token_ids
    and step_map as trace writes them."""
    output: str | None = None
    """Prefix of what is written: OUTPUT.bin, OUTPUT.idx and OUTPUT.json. Until it is complete, OUTPUT.unfinished holds
    what is done; the same command goes on from there."""
    workers: int | None = None
    """Processes that tokenise; one per processor of this host when it is not given. The result does not depend on
    it."""
    seq_length: int | None = None
    """Leave out samples that are longer, prompt and response together, in tokens; documents without a prompt stay
    whole. Nothing is left out when it is not given: a run leaves out, or cuts, what is too long for it."""
    chunk_bytes: int = 16 * 2**20
    """Bytes of a file that a process takes at a time, up to the end of a line; what is lost at most when it is
    killed. A compressed file is one chunk."""
    progress_bar: bool = True
    """Show a progress bar when the output is a terminal."""
