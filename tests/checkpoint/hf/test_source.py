"""What is wrong with a HuggingFace checkpoint is told in a sentence, before a weight is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_dlm.checkpoint.hf.source import HFSource
from megatron_dlm.checkpoint.hf.stored import whole_model
from megatron_dlm.config.errors import CheckpointError, UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.validate import check_model
from megatron_dlm.model.shape import resolve
from tests.checkpoint.hf.folders import make, per_expert, qwen3, read, write
from tests.model import family_oracles as oracles


def open_whole(folder) -> None:
    source = HFSource.open(folder)
    model = resolve(ModelConfig(**source.fields), None)
    check_model(model)
    source.check(whole_model(model), model)


def edit(folder, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


@pytest.fixture(scope="module")
def sdar(tmp_path_factory):
    weights = per_expert(qwen3(tied=False))
    config = json.loads((make("sdar", tmp_path_factory.mktemp("x") / "sdar") / "config.json").read_text())
    return lambda folder, **changes: write(folder, config, weights | changes, files=1)


def test_it_opens(tmp_path, sdar) -> None:
    folder = sdar(tmp_path / "hf")
    open_whole(folder)
    source = HFSource.open(folder)
    assert (source.family.name, source.mask_id, source.fields["block_size"]) == ("sdar", None, 4)
    edit(folder, vocab_size=151936)  # large enough for the usual mask token
    assert HFSource.open(folder).mask_id == 151669
    edit(folder, mask_token_id=7, block_size=16)
    assert (HFSource.open(folder).mask_id, HFSource.open(folder).fields["block_size"]) == (7, 16)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel, which is not known. Use one of SDAR"),
        (dict(architectures=...), "architecture none"),
        (dict(hidden_size=...), "has no hidden_size"),
        (dict(hidden_size=64), "has shape .* makes it"),
        (dict(num_hidden_layers=5), "has no tensor model.layers.4"),
        (dict(num_hidden_layers=3), "11 tensors that this model has no place for, model.layers.3"),
        (dict(tie_word_embeddings=True, num_key_value_heads=4), "has shape"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4}), "scales its rotary positions .yarn."),
        (dict(use_sliding_window=True), "use_sliding_window True"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(num_attention_heads=5), "does not divide the 5 attention heads"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path, sdar, changes: dict, words: str) -> None:
    folder = sdar(tmp_path / "hf")
    edit(folder, **changes)
    with pytest.raises(UserError, match=words):
        open_whole(folder)


def test_a_tied_model_may_carry_its_head_twice(tmp_path, sdar) -> None:
    folder = sdar(tmp_path / "hf")
    edit(folder, tie_word_embeddings=True)
    open_whole(folder)


def test_tensors_left_over_missing_or_harmless(tmp_path, sdar) -> None:
    extra = sdar(tmp_path / "extra", **{"model.layers.0.adapter.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="1 tensors .* model.layers.0.adapter.weight among them"):
        open_whole(extra)
    open_whole(sdar(tmp_path / "harmless", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}))
    weights = read(sdar(tmp_path / "less"))
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "less" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor lm_head.weight"):
        open_whole(tmp_path / "less")


@pytest.mark.parametrize(
    "content, words",
    [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "is not JSON")],
)
def test_a_config_that_cannot_be_read(tmp_path, content, words: str) -> None:
    (tmp_path / "hf").mkdir()
    if content is not None:
        (tmp_path / "hf" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        HFSource.open(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="There is no folder"):
        HFSource.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("llada", dict(block_type="sequential"), "block_type"),
        ("llada", dict(alibi=True), "alibi True"),
        ("llada", dict(attention_layer_norm=True), "attention_layer_norm True"),
        ("llada2", dict(use_bias=True), "use_bias True"),
        ("llada2", dict(expert_capacity=48), "expert_capacity 48"),
        ("llada2", dict(score_function="softmax"), "score_function 'softmax'"),
        ("llada2", dict(norm_head=True), "norm_head True"),
        ("dream", dict(use_mrope=True), "use_mrope True"),
    ],
)
def test_other_families_refuse_what_they_are_not(tmp_path, kind: str, changes: dict, words: str) -> None:
    folder = make(kind, tmp_path / "hf")
    open_whole(folder)
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=words):
        open_whole(folder)


def test_theta_is_found_in_both_places(tmp_path) -> None:
    folder = make("llada2", tmp_path / "hf")
    theta = oracles.LLADA2["rope_theta"]
    assert HFSource.open(folder).fields["rotary_base"] == theta
    edit(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert HFSource.open(folder).fields["rotary_base"] == theta
