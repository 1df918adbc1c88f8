"""Flags, the YAML file and defaults: who beats whom, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import read_fields
from megatron_dlm.config.flags import build_parser, parse
from megatron_dlm.config.sections import PARTS, SECTIONS, pick, pick_for_rows, pick_parts

SFT = pick("model", "optimizer", "checkpoint", "logging", "sft", "run")
RL = pick(*(name for name in SECTIONS if name not in ("sft", "generate", "score", "trace", "preprocess")))


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_without_flags_everything_is_default():
    assert parse("sft", SFT, []) == {name: config() for name, config in SFT.items()}


def test_defaults_are_not_shared_between_calls():
    parse("rl", RL, [])["eval"].eval_remasking.append("static")
    assert parse("rl", RL, [])["eval"].eval_remasking == ["dynamic"]


@pytest.mark.parametrize(
    ("flags", "section", "name", "value"),
    [
        (["--num-layers", "3"], "model", "num_layers", 3),
        (["--num-layers=3"], "model", "num_layers", 3),
        (["--num-layers", "3", "--num-layers", "5"], "model", "num_layers", 5),
        (["--lr", "1e-6"], "optimizer", "lr", 1e-6),
        (["--optimizer", "sgd"], "optimizer", "optimizer", "sgd"),
        (["--bf16"], "model", "bf16", True),
        (["--bf16", "--no-bf16"], "model", "bf16", False),
        (["--no-qk-layernorm"], "model", "qk_layernorm", False),
        (["--no-progress-bar"], "logging", "progress_bar", False),
        (["--no-load-optim"], "checkpoint", "no_load_optim", True),
        (["--no-load-optim", "--load-optim"], "checkpoint", "no_load_optim", False),
        (["--load", "a b"], "checkpoint", "load", "a b"),
        (["--data-path", "a.jsonl", "b.jsonl", "--seed", "7"], "sft", "data_path", ["a.jsonl", "b.jsonl"]),
        (["--exit-duration-in-mins", "2"], "run", "exit_duration_in_mins", 2.0),
        (
            ["--transformer-override", "a=1e-3", "--transformer-override", "b=x=y"],
            "model",
            "transformer_overrides",
            {"a": 1e-3, "b": "x=y"},
        ),
    ],
)
def test_a_flag_sets_its_field_and_no_other(flags, section, name, value):
    config = parse("sft", SFT, flags)
    assert getattr(config[section], name) == value and type(getattr(config[section], name)) is type(value)
    for other, defaults in SFT.items():
        for field in read_fields(other, defaults):
            if field.name not in (name, "seed"):
                assert getattr(config[other], field.name) == field.default


@pytest.mark.parametrize(
    ("yaml", "flags", "lr", "bf16"),
    [
        ("", [], 1e-4, False),
        ("optimizer: {lr: 1e-5}\nmodel: {bf16: true}", [], 1e-5, True),
        ("optimizer: {lr: 1e-5}\nmodel: {bf16: true}", ["--lr", "1e-6", "--no-bf16"], 1e-6, False),
        (
            "optimizer: {lr: 1e-5}",
            ["--lr", "1e-4"],
            1e-4,
            False,
        ),  # a flag that repeats the default still beats the file
        ("optimizer: {lr: 1}\nmodel:\n", [], 1.0, False),
    ],
)
def test_a_flag_beats_the_file_and_the_file_beats_the_default(yaml, flags, lr, bf16, tmp_path):
    path = write(tmp_path, yaml)
    for argv in (["--config", path, *flags], [*flags, "--config", path]):
        config = parse("sft", SFT, argv)
        assert (config["optimizer"].lr, config["model"].bf16) == (lr, bf16)


@pytest.mark.parametrize(
    "command, flags, here, gone",
    [
        ("sft", ["--load", "run"], "load", "hf_checkpoint"),
        ("tracerl", ["--num-steps-per-rollout", "2"], "num_steps_per_rollout", "global_batch_size"),
    ],
)
def test_a_flag_replaces_the_files_alternative(command, flags, here, gone, tmp_path):
    """One of two ways to say the same. Where both are flags, or both are in the file, a check refuses them later."""
    section = {"sft": "checkpoint", "tracerl": "rl"}[command]
    value = {"checkpoint": "weights", "rl": 8}[section]
    file = write(tmp_path, f"{section}: {{{gone}: {value}}}")
    config = parse(command, pick(section), ["--config", file, *flags])[section]
    assert getattr(config, here) is not None and getattr(config, gone) is None
    other = "--" + gone.replace("_", "-")
    config = parse(command, pick(section), ["--config", file, *flags, other, str(value)])[section]
    assert getattr(config, here) is not None and getattr(config, gone) == value
    assert getattr(parse(command, pick(section), ["--config", file])[section], gone) == value


def test_overrides_merge_key_by_key_over_the_file(tmp_path):
    path = write(tmp_path, "model: {transformer_overrides: {a: 1, b: 2}}")
    config = parse("sft", SFT, ["--config", path, "--transformer-override", "b=3", "--transformer-override", "c=gelu"])
    assert config["model"].transformer_overrides == {"a": 1, "b": 3, "c": "gelu"}


def test_null_in_the_file_is_none(tmp_path):
    config = parse("rl", RL, ["--config", write(tmp_path, "rollout: {stop_token_ids: null}\ncheckpoint: {load: ~}")])
    assert config["rollout"].stop_token_ids is None and config["checkpoint"].load is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-layer", "3"], ["sft has no flag --num-layer.", "Did you mean --num-layers?"]),
        (["--num_layers", "3"], ["no flag --num_layers.", "Did you mean --num-layers?"]),
        (["-lr", "3"], ["no flag -lr.", "Did you mean --lr?"]),
        (["--nolr=3"], ["no flag --nolr."]),
        (["--zzzzzz"], ["no flag --zzzzzz.", "See sft --help"]),
        (
            ["--rollout-batch-size", "3"],
            ["no flag --rollout-batch-size."],
        ),  # of a section that this command does not read
        (["train.jsonl"], ["cannot place 'train.jsonl'", "--help"]),
        (["--lr"], ["--lr needs a value"]),
        (["--data-path"], ["--data-path needs a value"]),
        (["--lr", "--bf16"], ["--lr needs a value"]),
        (["--bf16=true"], ["--bf16 takes no value"]),
        (["--lr", "fast"], ["--lr needs a number, not 'fast'"]),
        (["--seed", "1.5"], ["--seed needs a whole number, not '1.5'"]),
        (["--optimizer", "adma"], ["--optimizer needs adam or sgd, not 'adma'", "Did you mean adam?"]),
        (["--output-dir", "out"], ["no flag --output-dir."]),
        (["--transformer-override", "gelu"], ["--transformer-override gelu is not KEY=VALUE", "add_bias_linear=true"]),
        (["--transformer-override", "a="], ["a= is not KEY=VALUE"]),
        (["--transformer-override", "=1"], ["=1 is not KEY=VALUE"]),
        (["--transformer-override", "a=[1"], ["--transformer-override a=[1", "not YAML"]),
        (["--config"], ["--config needs a value"]),
        (["--config", "/nowhere/c.yaml"], ["--config /nowhere/c.yaml cannot be read"]),
    ],
)
def test_a_faulty_command_line_is_one_sentence(flags, words, capsys):
    with pytest.raises(ConfigError) as caught:
        parse("sft", SFT, flags)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("optimiser: {lr: 1}", ["sft does not read a section optimiser", "Did you mean optimizer?"]),
        ("zzzzzz: {lr: 1}", ["section zzzzzz", "Use model, optimizer, checkpoint, logging, sft or run."]),
        ("rollout: {threshold: 1}", ["does not read a section rollout"]),
        ("lr: 1", ["lr stands at the top level", "below its section, optimizer"]),
        ("1: 2", ["section 1"]),
        ("optimizer: {learn_rate: 1}", ["The section optimizer", "has no key learn_rate"]),
        ("optimizer: {weight-decay: 1}", ["has no key weight-decay", "Did you mean weight_decay?"]),
        ("optimizer: {num_layers: 1}", ["has no key num_layers", "Did you mean model.num_layers?"]),
        ("run: {zzzzzz: 1}", ["has no key zzzzzz", "Use one of seed, exit_interval, exit_duration_in_mins, "]),
        ("run: {1: 1}", ["has no key 1"]),
        ("optimizer: fast", ["optimizer in", "needs keys below it, not 'fast'"]),
        ("optimizer: {lr: fast}", ["optimizer.lr in", "needs a number, not 'fast'"]),
        ("optimizer: {lr: null}", ["optimizer.lr in", "needs a number, not null"]),
        ("optimizer: {optimizer: lion}", ["optimizer.optimizer in", "needs adam or sgd"]),
        ("sft: {data_path: a.jsonl}", ["sft.data_path in", "needs a list"]),
        ("model: {transformer_overrides: [1]}", ["model.transformer_overrides in", "needs a mapping"]),
        ("run: {seed: 1, seed: 2}", ["the key seed stands twice"]),
    ],
)
def test_a_faulty_file_is_one_sentence_that_names_it(yaml, words, tmp_path):
    path = write(tmp_path, yaml)
    with pytest.raises(ConfigError) as caught:
        parse("sft", SFT, ["--config", path])
    assert all(word in str(caught.value) for word in [path, *words]) and "\n" not in str(caught.value)


@pytest.mark.parametrize("sections", [SFT, RL], ids=["sft", "rl"])
def test_help_shows_every_docstring_default_and_section(sections, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("train", sections, ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, config in sections.items():
        assert f"{section}: {config.__doc__}" in text
        for field in read_fields(section, config):
            assert all(flag in text for flag in field.flags)
            assert field.help in text
    assert "Highest learning rate. (default: 0.0001)" in text
    assert "--optimizer {adam,sgd}" in text
    assert text.startswith("usage: megatron-dlm train [--config FILE.yaml] [flags]")


def test_the_part_of_a_section_is_the_beginning_of_the_whole():
    whole, part = pick("model", *PARTS), pick_parts("model", *PARTS)
    assert part["model"] is whole["model"]
    for name in PARTS:
        known, all_of_them = ([field.name for field in read_fields(name, one[name])] for one in (part, whole))
        assert known == all_of_them[: len(known)] and len(known) < len(all_of_them)


def test_a_command_that_goes_over_rows_can_choose_by_which_means():
    flags = [flag for field in read_fields("parallel", pick_for_rows("parallel")["parallel"]) for flag in field.flags]
    assert {"--attention-backend", "--loss-head"} < set(flags) and "--overlap-grad-reduce" not in flags
    assert pick_for_rows(*PARTS) == {**pick_parts(*PARTS), "parallel": pick_for_rows("parallel")["parallel"]}


@pytest.mark.parametrize("flag", [
    "--attention-backend", "--loss-head", "--save", "--eval-interval", "--rollout-temperature", "--log-interval",
    "--overlap-grad-reduce",
])  # fmt: skip
def test_a_command_that_does_not_train_has_no_flag_that_it_would_ignore(flag):
    with pytest.raises(ConfigError, match=f"evaluate has no flag {flag}."):
        parse("evaluate", pick_parts(*PARTS), [flag, "1"])


def test_help_names_every_preset():
    from megatron_dlm.model.presets import PRESETS

    (text,) = [field.help for field in read_fields("model", SECTIONS["model"]) if field.name == "model_preset"]
    assert all(name in text for name in PRESETS)


def test_help_takes_a_percent_sign(capsys):
    with pytest.raises(SystemExit):
        parse("train", {"percent": Percent}, ["--help"])
    assert "In 100% of cases. (default: 5%)" in " ".join(capsys.readouterr().out.split())


def test_whatever_else_argparse_says_is_not_an_exit():
    parser, _ = build_parser("sft", SFT)
    with pytest.raises(ConfigError, match="megatron-dlm sft: something odd."):
        parser.error("something odd")


@dataclass(slots=True)
class Percent:
    """A section."""

    share: str = "5%"
    """In 100% of cases."""


@dataclass(slots=True)
class Bare:
    """A section."""

    load_optim: str = ""
    """Collides with the opposite of --no-load-optim."""


@dataclass(slots=True)
class Shadow:
    """A section."""

    config: str = ""
    """Collides with --config."""


@pytest.mark.parametrize(
    ("sections", "flag"),
    [
        (pick("sft", "rl"), "--shrinkage"),
        (pick("checkpoint") | {"bare": Bare}, "--load-optim"),
        ({"shadow": Shadow}, "--config"),
    ],
)
def test_one_flag_for_two_fields_cannot_be_defined(sections, flag):
    with pytest.raises(ValueError, match=f"{flag} would belong to"):
        build_parser("both", sections)
