"""Settings as a YAML file: read one, write one.

Invariants (tests/config/test_yaml_file.py):
  - what `dump` writes, `--config` reads back as equal settings;
  - 1e-4 is a number, as in YAML 1.2 (PyYAML alone takes it for text);
  - a key that stands twice is refused instead of one value silently winning.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.config.errors import ConfigError

_KINDS = {list: "a list", str: "text", int: "a number", float: "a number"}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


for _side in (_Loader, _Dumper):  # the dumper must know too, or it would write the text "1e-4" without quotes
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def load(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not UTF-8 text. Give a YAML file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {_reason(error)}. Correct the file.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds {_KINDS.get(type(content), 'a value')}, not sections with keys. "
            "Write sections, such as optimizer: {lr: 1e-5}."
        )
    return content


def parse_value(text: str, where: str) -> Any:
    """One YAML value, such as the right side of KEY=VALUE. `where` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} has a value that is not YAML: {_reason(error)}. Put text in quotes.") from None


def dump(config: dict[str, Any], path: str | Path) -> None:
    """Write all sections (name -> dataclass instance), defaults included, so that `--config` reads them back.

    The file appears whole or not at all. Call it on one process only.
    """
    write({name: dataclasses.asdict(section) for name, section in config.items()}, path)


def write(content: dict[str, Any], path: str | Path) -> None:
    """The same of plain data: section -> key -> value."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(unfinished, path)


def _reason(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}, " if mark else ""
    return place + (problem or " ".join(str(error).split()))
