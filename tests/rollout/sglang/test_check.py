"""What SGLang cannot do is refused in one sentence, before anything runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from megatron_dlm.config.errors import ConfigError, DependencyError, UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.rollout.sglang.check import check_backend, check_interpreter, check_model, model_config
from megatron_dlm.rollout.sglang.plugin import parse_version
from megatron_dlm.rollout.sglang.process import server_command
from tests.tiny import model_config as tiny


def python(folder: Path, answer: str, code: int = 0) -> str:
    """A program that answers so, whatever it is asked."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
    file.chmod(0o755)
    return str(file)


def says(sglang: str | None) -> str:
    return json.dumps({"python": [3, 12, 1], "sglang": sglang, "torch": "2.14.1"})


def rollout(**changes: object) -> RolloutConfig:
    return RolloutConfig(**dict(rollout_backend="sglang") | changes)


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.6.0rc1", "1.0"])
def test_an_interpreter_that_has_sglang(tmp_path, version: str) -> None:
    found = check_interpreter(python(tmp_path, says(version)))
    assert (found.python, found.sglang) == ((3, 12, 1), version)
    check_backend(rollout(sglang_python=python(tmp_path, says(version))), tiny(), 2)


def test_a_real_interpreter_answers() -> None:
    """This one, which has no SGLang."""
    with pytest.raises(DependencyError, match="has no SGLang"):
        check_interpreter(sys.executable)


@pytest.mark.parametrize(
    "answer, kind, words",
    [
        (says(None), DependencyError, "has no SGLang. Install"),
        (says("0.5.22"), DependencyError, "SGLang 0.5.22, which is too old"),
        (says("0.4.9.post3"), DependencyError, "too old"),
        ("{}", ConfigError, "does not run Python"),
        ("[1]", ConfigError, "does not run Python"),
        ("no JSON", ConfigError, "does not run Python"),
        ("", ConfigError, "does not run Python"),
    ],
)
def test_an_interpreter_that_does_not_fit(tmp_path, answer: str, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        check_interpreter(python(tmp_path, answer))


def test_no_interpreter(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--sglang-python is not set"):
        check_interpreter(None)
    (tmp_path / "data").write_text("")
    for path in (tmp_path / "none", tmp_path, tmp_path / "data"):
        with pytest.raises(ConfigError, match="is no program"):
            check_interpreter(str(path))


def moe(**changes: object) -> ModelConfig:
    return tiny(**dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16) | changes)


@pytest.mark.parametrize(
    "model, name",
    [
        (tiny(), "sdar"),
        (tiny(untie_embeddings_and_output_weights=False), "sdar"),
        (moe(), "sdar-moe"),
        (resolve(ModelConfig(model_preset="llada2-mini"), None), "llada2"),
        (resolve(ModelConfig(model_preset="sdar-8b"), None), "sdar"),
        (resolve(ModelConfig(model_preset="sdar-30b-a3b"), None), "sdar-moe"),
    ],
)
def test_models_that_sglang_serves(model: ModelConfig, name: str) -> None:
    family = check_model(model, model.block_size)
    assert family.name == name
    assert model_config(family, model)["architectures"] == [family.architecture]


@pytest.mark.parametrize(
    "model, block, words",
    [
        (tiny(fp64=True), 4, "float64"),
        (tiny(block_size=None, full_attention=True), 4, "full attention"),
        (tiny(logit_shift=1), 4, "--logit-shift 1"),
        (tiny(), 1, "blocks of 2 tokens or more"),
        (tiny(), None, "blocks of 2 tokens or more"),
        (tiny(add_qkv_bias=True), 4, "none of them"),
        (tiny(qk_layernorm=False), 4, "none of them"),
        (tiny(rotary_percent=0.5), 4, "none of them"),
        (moe(moe_router_enable_expert_bias=True), 4, "none of them"),
    ],
)
def test_models_that_it_does_not(model: ModelConfig, block: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        check_model(model, block)
    assert "native" in str(found.value) or "--fp64" in str(found.value)


def test_settings(tmp_path) -> None:
    fine = rollout(sglang_python=python(tmp_path, says("0.5.23")))
    check_backend(fine, tiny(), 1)
    check_backend(RolloutConfig(), tiny(fp64=True), 1)  # the native engine is none of our business
    for config, tensor_size, words in (
        (dataclasses.replace(fine, rollout_backend="native"), 1, "of use with --rollout-backend sglang only"),
        (dataclasses.replace(fine, sglang_mem_fraction_static=0.0), 1, "is 0.0. Use a share"),
        (dataclasses.replace(fine, sglang_mem_fraction_static=1.0), 1, "is 1.0. Use a share"),
        (fine, 3, "4 attention heads of this model among 3"),
        (dataclasses.replace(fine, verify_refit=True), 1, "--verify-refit"),
        (dataclasses.replace(fine, rollout_expert_model_parallel_size=2), 1, "parallel-size 2 does not work"),
        (dataclasses.replace(fine, rollout_block_size=1), 1, "block size is 1"),
    ):
        with pytest.raises(UserError, match=words):
            check_backend(config, tiny(), tensor_size)


def test_an_interpreter_may_be_given_from_here(tmp_path, monkeypatch) -> None:
    python(tmp_path, says("0.5.23"))
    (name,) = (path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path.parent)
    for given in (f"{tmp_path.name}/{name}", f"./{tmp_path.name}/{name}"):
        assert check_interpreter(given).sglang == "0.5.23"
        assert server_command(given)[0] == str(tmp_path / name)
    (tmp_path / "link").symlink_to(sys.executable)  # as in a virtual environment
    assert server_command(f"{tmp_path.name}/link")[0] == str(tmp_path / "link")


def test_versions() -> None:
    assert parse_version("0.5.23.post2") == (0, 5, 23) < parse_version("0.5.24") < parse_version("0.6.0rc1")
    assert parse_version("0.5.23+cpu") == (0, 5, 23)
    assert parse_version("garbage") == ()
