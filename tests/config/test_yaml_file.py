"""Settings as YAML files."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import SECTIONS, pick
from megatron_dlm.config.yaml_file import dump, load, parse_value

ALL_BUT_SFT = pick(*(name for name in SECTIONS if name not in ("sft", "generate", "score", "trace", "preprocess")))
ALL_BUT_RL = pick(*(name for name in SECTIONS if name not in ("rl", "generate", "score", "trace", "preprocess")))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        ("1.0e-4", 1e-4),
        (".5e1", 5.0),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("gelu", "gelu"),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_a_value_is_what_yaml_1_2_says(text, value):
    parsed = parse_value(text, "--x")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("sections", [ALL_BUT_SFT, ALL_BUT_RL], ids=["rl", "sft"])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lr", "1e-05", "--weight-decay", "0", "--no-progress-bar", "--no-load-optim", "--bf16"],
        ["--wandb-project", "1e-4", "--wandb-exp-name", "yes", "--wandb-save-dir", "null"],
        ["--prompt-template", "Frage: {question}\nGrüße, \\boxed{}: # no comment", "--stop-token-ids", "3", "1"],
        [
            "--eval-remasking",
            "static",
            "dynamic",
            "--eval-prompt-data",
            "a.jsonl",
            "reasoning_gym:chain_sum?size=4&seed=1",
        ],
        ["--transformer-override", "layernorm_zero_centered_gamma=true", "--transformer-override", "x={a: [1, 2e-3]}"],
    ],
    ids=range(6),
)
def test_what_dump_writes_parse_reads_back(sections, flags, tmp_path):
    config = parse("train", sections, flags)
    dump(config, tmp_path / "new" / "config.yaml")
    assert parse("train", sections, ["--config", str(tmp_path / "new" / "config.yaml")]) == config


def test_dump_writes_defaults_too_and_leaves_no_other_file(tmp_path):
    dump(parse("train", ALL_BUT_SFT, []), tmp_path / "config.yaml")
    content = load(tmp_path / "config.yaml")
    assert list(content) == list(ALL_BUT_SFT)
    assert content["optimizer"]["adam_beta2"] == 0.999
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_says_nothing(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert load(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"optimizer: {lr: 1", ["not valid YAML", "line 1"]),
        (b"a: 1\nb: [\x01]\n", ["not valid YAML"]),
        (b"optimizer:\n  lr: 1\n  lr: 2\n", ["not valid YAML", "line 3", "the key lr stands twice"]),
        (b"run: {}\nrun: {}\n", ["line 2", "the key run stands twice"]),
        (b"- lr\n", ["holds a list", "sections"]),
        (b"run: \xff\n", ["not UTF-8"]),
        (b"run: !!python/object:os.system {}\n", ["not valid YAML"]),
    ],
)
def test_a_faulty_file_is_refused(content, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert all(word in str(caught.value) for word in [str(path), *words]) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="gone.yaml cannot be read .No such file"):
        load(tmp_path / "gone.yaml")


def test_a_faulty_value_is_refused():
    with pytest.raises(ConfigError, match="--x has a value that is not YAML"):
        parse_value("[1", "--x")
