"""A sentencepiece model (tokenizer.model) as a backend of `Tokenizer`.

sentencepiece by itself never reads a control symbol in text, may put a space before every text, and cannot tell a space
from the character with which it writes one. Here text is cut at special tokens first; the model is told to add no space
and to keep those that are there, whatever it was trained with; and the space's character is spelled in bytes.

What sentencepiece has no place for stands in HuggingFace's files beside the model: tokenizer_config.json (eos_token,
pad_token, mask_token; added tokens, whose ids go on where the model's end, and other names for ids of the model) and
chat_template.jinja.

Invariants (tests/data/test_tokenizer_sentencepiece.py): for a model with byte fallback and without normalisation,
decode(encode(text)) == text for every text; the encoding of texts joined by special tokens is their encodings joined.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_dlm.config.errors import DataError, DependencyError

VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"
SPACE = "▁"  # a space in the vocabulary of sentencepiece
ROLES = ("bos", "eos", "pad", "unk", "mask")
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of a ModelProto; every trained model has them
# A message put behind another merges into it: NormalizerSpec(add_dummy_prefix=False, remove_extra_whitespaces=False)
_KEEP_SPACES = bytes([_NORMALIZER << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])


class SentencePiece:
    """See `Backend` in data/tokenizer.py."""

    mask_is_new = False  # a mask_token that no file has is refused

    def __init__(self, folder: Path):
        self._model, self._pieces = _load(folder / VOCABULARY)
        self._settings = _read_settings(folder / SETTINGS)
        self.chat_template = _template(folder, self._settings.pop("chat_template", None))
        of_model = self._pieces.get_piece_size()
        special = {i for i in range(of_model) if self._pieces.is_control(i) or self._pieces.is_unknown(i)}
        entries = _named(self._settings.pop("added_tokens_decoder", None) or {}, self._pieces, folder)
        self.size = max(of_model, *(i + 1 for i in entries)) if entries else of_model
        if [i for i in entries if i >= of_model] != list(range(of_model, self.size)):
            raise DataError(
                f"The added tokens in {folder / SETTINGS} do not have the ids that follow the {of_model} of "
                f"{VOCABULARY}. Number them {of_model}, {of_model + 1} and so on."
            )
        self._names = {i: name for i, (name, _) in entries.items() if name is not None}  # other than the model's own
        self._special = special | {i for i, (_, is_special) in entries.items() if is_special}
        self._roles = {role: self._role(role, folder) for role in ROLES}
        self._special |= {i for i in self._roles.values() if i is not None}
        self._compile()

    @property
    def eos_id(self) -> int | None:
        return self._roles["eos"]

    @property
    def pad_id(self) -> int | None:
        return self._roles["pad"]

    @property
    def mask_id(self) -> int | None:
        return self._roles["mask"]

    def find(self, token: str) -> int | None:
        for token_id, name in self._names.items():
            if name == token:
                return token_id
        found = self._pieces.piece_to_id(token)  # that of the unknown token if there is no such piece
        return found if self.name(found) == token else None

    def name(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        return self._pieces.id_to_piece(token_id) if 0 <= token_id < self.size else None

    def declare_mask(self, token: str) -> int:
        found = self.find(token)
        if found is None:
            found, self.size = self.size, self.size + 1
            self._names[found] = token
        self._roles["mask"] = found
        self._special.add(found)
        self._compile()
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._cut.split(text):
            ids += self._spelled[part] if part in self._spelled else self._pieces.encode(part)
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id not in self._special and token_id not in self._names:
                run.append(token_id)
                continue
            text.append(self._pieces.decode(run))
            run = []
            if not (skip_special_tokens and token_id in self._special):
                text.append(self.name(token_id))
        return "".join([*text, self._pieces.decode(run)])

    def render(self, messages: list[dict[str, str]]) -> str:
        tokens = {f"{role}_token": self.name(i) for role, i in self._roles.items() if i is not None}
        return _jinja().from_string(self.chat_template).render(messages=messages, add_generation_prompt=True, **tokens)

    def save(self, folder: Path) -> None:
        tokens = {f"{role}_token": self.name(i) for role, i in self._roles.items() if i is not None}
        listed = sorted(self._names.keys() | self._special)
        named = {str(i): {"content": self.name(i), "special": i in self._special} for i in listed}
        settings = {**self._settings, **tokens, "added_tokens_decoder": named}
        (folder / VOCABULARY).write_bytes(self._model)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / TEMPLATE).write_text(self.chat_template, encoding="utf-8")

    def _role(self, role: str, folder: Path) -> int | None:
        """Id of the stop token, say: by its name in tokenizer_config.json, else by the model."""
        declared = self._settings.get(f"{role}_token")
        if declared is None:
            found = getattr(self._pieces, f"{role}_id", lambda: -1)()
            return found if found >= 0 else None
        name = declared.get("content") if isinstance(declared, dict) else declared
        found = self.find(name) if isinstance(name, str) else None
        if found is None:
            raise DataError(
                f"The {role}_token {name} in {folder / SETTINGS} is no token of the tokenizer there. "
                "Correct it, or add it to added_tokens_decoder."
            )
        return found

    def _compile(self) -> None:
        """What `encode` cuts text at, and the ids of that."""
        unknown = self._pieces.unk_id()
        named = {self.name(i): [i] for i in self._special if i != unknown} | {n: [i] for i, n in self._names.items()}
        in_bytes = [self.find(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if None not in in_bytes:
            named[SPACE] = in_bytes
        self._spelled = named
        longest_first = sorted(named, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _load(path: Path):
    """The bytes of a model, and a processor that adds and removes no spaces."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise DependencyError(
            f"{path} needs the sentencepiece package, which is not installed. Run: pip install sentencepiece"
        ) from None
    try:
        model = path.read_bytes()
        if not {_PIECES, _TRAINER, _NORMALIZER} <= _fields(model):
            raise ValueError
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(model + _KEEP_SPACES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}). Correct its permissions.") from None
    except (ValueError, IndexError, RuntimeError):
        raise DataError(
            f"{path} is cut short, or no sentencepiece model. Give an undamaged one, or a HuggingFace tokenizer.json."
        ) from None
    return model, processor


def _fields(message: bytes) -> set[int]:
    """Numbers of the fields of a serialized message all of whose fields have a length.

    sentencepiece reads a file that ends between two fields as a smaller model.

    Raises:
        ValueError, IndexError: it ends within a field, or is no such message.
    """
    numbers, place = set(), 0
    while place < len(message):
        tag, place = _varint(message, place)
        length, place = _varint(message, place)
        place += length
        if tag & 7 != 2 or place > len(message):
            raise ValueError
        numbers.add(tag >> 3)
    return numbers


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while message[place] & 128:
        value, shift, place = value | (message[place] & 127) << shift, shift + 7, place + 1
    return value | message[place] << shift, place + 1


def _read_settings(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"The tokenizer settings {path} cannot be read ({error}). Correct the file.") from None
    if not isinstance(values, dict):
        raise DataError(f"The tokenizer settings {path} are no JSON object. Correct the file.")
    return values


def _template(folder: Path, in_settings: object) -> str | None:
    """chat_template.jinja, or else what tokenizer_config.json says."""
    path = folder / TEMPLATE
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else in_settings
    except (OSError, ValueError) as error:
        raise DataError(f"The chat template {path} of the tokenizer cannot be read ({error}). Correct it.") from None
    if template is not None and not isinstance(template, str):
        raise DataError(f"The chat_template in {folder / SETTINGS} is not text. Write it as {TEMPLATE}.")
    return template


def _named(entries: object, pieces, folder: Path) -> dict[int, tuple[str | None, bool]]:
    """Ids of added_tokens_decoder, in order -> (its name, None if the model names it alike; whether it is special)."""
    found = {}
    try:
        for key, entry in sorted(entries.items(), key=lambda item: int(item[0])):
            token_id, name = int(key), entry["content"]
            own = pieces.id_to_piece(token_id) if 0 <= token_id < pieces.get_piece_size() else None
            if not (isinstance(name, str) and name) or token_id < 0:
                raise ValueError
            found[token_id] = None if own == name.replace(" ", SPACE) else name, bool(entry.get("special", False))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"The added_tokens_decoder in {folder / SETTINGS} of the tokenizer is malformed. "
            'Write {"id": {"content": "token", "special": true}, ...}.'
        ) from None
    return found


def _jinja():
    """As HuggingFace renders chat templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    return environment
