"""A command's settings, from flags, a YAML file and defaults.

    config = parse("sft", pick("model", "optimizer", "sft"), sys.argv[1:])
    config["optimizer"].lr

Flags are flat, in Megatron's spelling (--lr-warmup-iters); the YAML file of --config has one section per dataclass
(optimizer: {lr: 1e-5}). A flag beats the file, the file beats the default in the dataclass; of a flag given twice, the
last one counts (--transformer-override adds up). --load replaces the hf_checkpoint of a file, and the like
(`ALTERNATIVES`). Nothing unknown is ignored.

Invariants (tests/config/test_flags.py):
  - every mistake of the user is one `ConfigError`; only --help exits;
  - a command cannot be defined with one flag for two fields.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dlm.config import yaml_file
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import Field, from_text, from_yaml, one_of, read_fields, suggest

ALTERNATIVES = (("load", "hf_checkpoint"), ("global_batch_size", "num_steps_per_rollout"))
"""Fields of one section of which a run has one: given as a flag, it replaces what the YAML file says of the other."""

_METAVARS = {int: "N", float: "X", str: "TEXT", dict: "KEY=VALUE"}


def parse(command: str, sections: dict[str, type], argv: Sequence[str]) -> dict[str, Any]:
    """Read a command's settings.

    Args:
        command: the command's name, for --help and error messages.
        sections: section name -> dataclass, as `sections.pick` gives them.
        argv: the command line without the program's name.

    Returns:
        section name -> instance of its dataclass, all sections, in the same order.

    Raises:
        ConfigError: something unknown, of the wrong type, or unreadable.
        ValueError, TypeError: the sections themselves are faulty (see `build_parser`).
    """
    parser, fields = build_parser(command, sections)
    found, rest = parser.parse_known_args(list(argv))
    if rest:
        raise _unknown_argument(command, rest[0], fields)
    given = vars(found)
    values = {name: {} for name in sections}
    if "config" in given:
        path = given.pop("config")
        _take_content(command, yaml_file.load(path), path, fields, values)
    flags = {field.name for field in fields if field.flag in given}
    for field in fields:
        if any(field.name in pair and field.name not in flags and flags & {*pair} for pair in ALTERNATIVES):
            values[field.section].pop(field.name, None)
        if field.flag in given:
            _take_flag(field, given[field.flag], values[field.section])
    return {name: config(**values[name]) for name, config in sections.items()}


def parse_content(command: str, sections: Mapping[str, type], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A command's settings from sections that a YAML file would hold; see `parse`. `where` names them in errors."""
    _, fields = build_parser(command, dict(sections))
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    _take_content(command, content, where, fields, values)
    return {name: config(**values[name]) for name, config in sections.items()}


def build_parser(command: str, sections: dict[str, type]) -> tuple[argparse.ArgumentParser, list[Field]]:
    """The argument parser of a command and the fields behind it. The parser keeps values as text, under their flag.

    Raises:
        ValueError: two fields of these sections would have the same flag, or a field has no docstring.
    """
    parser = _Parser(
        prog=f"megatron-dlm {command}",
        usage=f"megatron-dlm {command} [--config FILE.yaml] [flags]",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this text.")
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the sections below; flags beat it.")
    owners = {"--help": "the parser", "--config": "the parser"}
    fields = []
    for section, config in sections.items():
        group = parser.add_argument_group(section, (config.__doc__ or "").strip().split("\n")[0])
        for field in read_fields(section, config):
            for flag in field.flags:
                if flag in owners:
                    raise ValueError(f"{command}: {flag} would belong to {owners[flag]} and to {section}.{field.name}")
                owners[flag] = f"{section}.{field.name}"
            _add_argument(group, field)
            fields.append(field)
    return parser, fields


class _Formatter(argparse.HelpFormatter):
    """Breaks no line inside a flag or a hyphenated word."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """argparse would print its usage and exit; we raise one sentence."""
        match = re.fullmatch(r"argument ([^\s/]+)\S*: (.*)", message, flags=re.DOTALL)
        if match is None:
            raise ConfigError(f"{self.prog}: {message}.")
        flag, problem = match.groups()
        if problem.startswith("ignored explicit argument"):
            raise ConfigError(f"{flag} takes no value. Write {flag} alone, or its opposite (see --help).")
        raise ConfigError(f"{flag} needs a value. Write it after the flag; --help says of which kind.")


class _OnOff(argparse.Action):
    """--flag stores True and --no-flag False."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _add_argument(group: argparse._ArgumentGroup, field: Field) -> None:
    text = field.help.replace("%", "%%") + _default_text(field)
    if field.kind.item is bool:
        group.add_argument(*field.flags, dest=field.flag, action=_OnOff, nargs=0, help=text)
        return
    metavar = "{" + ",".join(field.kind.choices) + "}" if field.kind.choices else _METAVARS[field.kind.item]
    how = {"nargs": "+"} if field.kind.many else {"action": "append"} if field.kind.item is dict else {}
    group.add_argument(field.flag, dest=field.flag, metavar=metavar, help=text, **how)


def _default_text(field: Field) -> str:
    default = field.default
    if default is None or default == [] or default == {}:
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, list):
        default = " ".join(map(str, default))
    return f" (default: {default})".replace("%", "%%")


def _take_flag(field: Field, text: Any, values: dict[str, Any]) -> None:
    if field.kind.item is bool:
        values[field.name] = text  # already True or False
    elif field.kind.item is dict:
        merged = dict(values.get(field.name, {}))  # key by key over what the YAML file says
        for item in text:
            key, equals, value = item.partition("=")
            if not (key.isidentifier() and equals and value):
                raise ConfigError(
                    f"{field.flag} {item} is not KEY=VALUE. Write for example {field.flag} add_bias_linear=true."
                )
            merged[key] = yaml_file.parse_value(value, f"{field.flag} {item}")
        values[field.name] = merged
    else:
        values[field.name] = from_text(field.kind, text, field.flag)


def _take_content(
    command: str, sections: Mapping[str, Any], path: str, fields: list[Field], values: dict[str, dict[str, Any]]
) -> None:
    for section, content in sections.items():
        if section not in values:
            raise _unknown_section(command, section, path, fields, values)
        if content is None:  # a heading with all its keys commented out
            continue
        if not isinstance(content, dict):
            raise ConfigError(
                f"{section} in {path} needs keys below it, not {content!r}. Write {section}: and its keys, indented."
            )
        known = {field.name: field for field in fields if field.section == section}
        for key, value in content.items():
            if key not in known:
                elsewhere = [f"{field.section}.{field.name}" for field in fields if field.name == key]
                hint = (
                    f"Did you mean {elsewhere[0]}?"
                    if elsewhere
                    else suggest(str(key), known, f"Use one of {', '.join(known)}.")
                )
                raise ConfigError(f"The section {section} in {path} has no key {key}. {hint}")
            values[section][key] = from_yaml(known[key].kind, value, f"{section}.{key} in {path}")


def _unknown_section(command: str, name: Any, path: str, fields: list[Field], values: dict[str, Any]) -> ConfigError:
    owner = next((field.section for field in fields if field.name == name), None)
    if owner is not None:
        return ConfigError(f"{name} stands at the top level of {path}. Write it below its section, {owner}.")
    hint = suggest(str(name), values, f"Use {one_of(values)}.")
    return ConfigError(f"{command} does not read a section {name}, which stands in {path}. {hint}")


def _unknown_argument(command: str, argument: str, fields: list[Field]) -> ConfigError:
    if not argument.startswith("-"):
        return ConfigError(f"{command} cannot place {argument!r}. Write a value after its flag; see --help.")
    flag = argument.partition("=")[0]
    known = ["--config", "--help"] + [name for field in fields for name in field.flags]
    hint = suggest("--" + flag.lstrip("-").replace("_", "-"), known, f"See {command} --help for all flags.")
    return ConfigError(f"{command} has no flag {flag}. {hint}")
