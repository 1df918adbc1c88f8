"""A HuggingFace fast tokenizer (tokenizer.json) as a backend of `Tokenizer`.

Two things that transformers does without a word are undone or refused here, because they move ids away from those that
a model was trained with. Where tokenizer_config.json gives an id another name than tokenizer.json does (published
checkpoints do, for the mask), it adds that name as one more token: here the token is renamed instead. Where the ids of
added tokens have gaps, it numbers them anew: that is refused.

Invariants (tests/data/test_tokenizer_huggingface.py): ids are those of the files, however often a tokenizer is saved
and read; what is saved is in the old spelling, which transformers 4 and 5 read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from megatron_dlm.config.errors import DataError, DependencyError

VOCABULARY, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_BESIDE = (SETTINGS, "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates")


class HuggingFace:
    """See `Backend` in data/tokenizer.py."""

    def __init__(self, folder: Path):
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise DependencyError(
                "Tokenizers need the transformers package, which is not installed. Run: pip install transformers"
            ) from None
        try:
            text = (folder / VOCABULARY).read_text(encoding="utf-8")
            own = {entry["id"]: entry["content"] for entry in json.loads(text).get("added_tokens", ())}
            declared = _declared(folder)
            renamed = {key: name for key, name in declared.items() if own.get(key, name) != name}
            if renamed:
                self._hf = _load_renamed(PreTrainedTokenizerFast, folder, text, renamed)
            else:
                self._hf = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            vocabulary = self._hf.get_vocab()
        except Exception as error:  # tokenizers raises bare Exception for a broken file
            raise DataError(
                f"The tokenizer in {folder} cannot be loaded ({' '.join(str(error).split())[:200]}). "
                "Export it again with save_pretrained."
            ) from error
        for token_id, name in {**own, **declared}.items():
            if vocabulary.get(name) != token_id:
                raise DataError(
                    f"The token {name} of the tokenizer in {folder} has the id {token_id} in its files and "
                    f"{vocabulary.get(name)} when it is loaded, because the ids of added tokens have gaps or are given "
                    "twice. Correct the files."
                )
        self.size = max(vocabulary.values()) + 1
        self.eos_id, self.pad_id, self.mask_id = (
            getattr(self._hf, f"{role}_token_id") for role in ("eos", "pad", "mask")
        )
        spelled = [json.dumps(self._hf.mask_token, ensure_ascii=ascii) for ascii in (False, True)]
        self.mask_is_new = self.mask_id is not None and not renamed and not any(name in text for name in spelled)

    @property
    def chat_template(self) -> object | None:
        return self._hf.chat_template

    def find(self, token: str) -> int | None:
        return self._hf.backend_tokenizer.token_to_id(token)

    def name(self, token_id: int) -> str | None:
        return self._hf.convert_ids_to_tokens(token_id)

    def declare_mask(self, token: str) -> int:
        from transformers import AddedToken

        self._hf.add_special_tokens({"mask_token": AddedToken(token, special=True, normalized=False)})
        self.mask_id = self._hf.mask_token_id
        self.size = max(self.size, self.mask_id + 1)
        return self.mask_id

    def encode(self, text: str) -> list[int]:
        return self._hf.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def render(self, messages: list[dict[str, str]]) -> str:
        return self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def save(self, folder: Path) -> None:
        self._hf.save_pretrained(str(folder))
        spell_as_before(folder)


def spell_as_before(folder: Path) -> None:
    """transformers 5 writes a class and a list that transformers 4 does not know; it reads the old ones as well."""
    path = folder / SETTINGS
    values = json.loads(path.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _declared(folder: Path) -> dict[int, str]:
    """The added tokens of tokenizer_config.json: id -> name."""
    if not (folder / SETTINGS).is_file():
        return {}
    entries = json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
    return {int(key): entry["content"] for key, entry in entries.items()}


def _load_renamed(loader: type, folder: Path, text: str, renamed: dict[int, str]):
    """Load a tokenizer some of whose added tokens get other names."""
    content = json.loads(text)
    for entry in content["added_tokens"]:
        entry["content"] = renamed.get(entry["id"], entry["content"])
    words = content["model"].get("vocab")
    if isinstance(words, dict):  # which may hold added tokens, too
        content["model"]["vocab"] = {renamed.get(token_id, name): token_id for name, token_id in words.items()}
    with tempfile.TemporaryDirectory() as corrected:
        for path in (folder / name for name in _BESIDE):
            if path.is_dir():
                shutil.copytree(path, Path(corrected) / path.name)
            elif path.is_file():
                shutil.copyfile(path, Path(corrected) / path.name)
        (Path(corrected) / VOCABULARY).write_text(json.dumps(content), encoding="utf-8")
        return loader.from_pretrained(corrected, local_files_only=True)
