"""The configurations of configs/: each loads, passes a dry run, and has the numbers of the published runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megatron_dlm.__main__ import main
from megatron_dlm.commands import sft, tracerl
from megatron_dlm.config.flags import parse
from megatron_dlm.config.objective import with_method
from megatron_dlm.config.sections import pick

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS_OF = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
SFT = [name for name, sections in SECTIONS_OF.items() if "sft" in sections and "stages" not in sections]
NAMES = [name for name, sections in SECTIONS_OF.items() if "rl" in sections and "stages" not in sections]
ALL = [*SFT, *NAMES]

MATH = {
    "rollout.rollout_batch_size": 128,
    "rollout.n_samples_per_prompt": 32,
    "rollout.rollout_max_response_len": 2000,
    "rollout.rollout_max_prompt_len": 784,
    "rollout.remasking": "dynamic",
    "rollout.threshold": 0.9,
    "rollout.denoising_steps": 4,
    "rollout.rollout_temperature": 1.0,
    "rollout.rollout_top_p": 1.0,
    "rollout.rollout_top_k": 0,
    "rl.rl_method": "tracerl",
    "rl.eps_clip": 0.2,
    "rl.kl_loss_coef": 0.01,
    "rl.kl_loss_type": "k3",
    "rl.kl_reference": "old",
    "rl.shrinkage": 1,
    "rl.min_group_accuracy": 0.2,
    "rl.max_group_accuracy": 0.8,
    "rl.overlong_margin": 5,
    "rl.num_rollout": 160,
    "optimizer.lr": 1e-6,
    "optimizer.lr_decay_style": "constant",
    "optimizer.weight_decay": 0.0,
    "optimizer.adam_beta2": 0.999,
    "optimizer.clip_grad": 1.0,
    "eval.eval_interval": 5,
    "value.use_value_model": False,
    "model.bf16": True,
    "run.seed": 10086,
}
SMALL = {"model.model_preset": "sdar-4b", "rl.global_batch_size": 64}
LARGE = {"model.model_preset": "sdar-8b", "rl.global_batch_size": 128}
EXPERTS = LARGE | {
    "model.model_preset": "sdar-30b-a3b",
    "parallel.expert_model_parallel_size": 8,
    "rollout.rollout_expert_model_parallel_size": 1,
}
LAYOUTS = {"tracerl_30b_a3b": "tensor 4 x pipeline 1 x data 16, experts over 8"}
VALUE = {"value.use_value_model": True, "value.value_lr": 5e-6, "value.gamma": 1.0, "value.gae_lambda": 1.0}
PROGRAMS = {
    "reward.reward": "code",
    "reward.reward_value": "score",
    "rl.min_group_accuracy": 0.0,
    "rl.max_group_accuracy": 1.0,
    "rl.overlong_margin": 0,
}
EXPANSION = {"model.block_size": 8, "rl.old_logprobs": "recomputed"}
DRAWN = {"rl.mask_draws": 1, "rl.mask_ratio_per": "token", "rl.mask_ratio_low": 0.1, "rl.mask_ratio_high": 0.9}
PUBLISHED = {
    "tracerl_4b_math_value": MATH | SMALL | VALUE,
    "tracerl_4b_math": MATH | SMALL,
    "tracerl_4b_random_masking": MATH | SMALL | DRAWN | {"rl.rl_method": "random_masking"},
    "tracerl_4b_coupled": MATH | SMALL | DRAWN | {"rl.rl_method": "coupled", "rl.coupled_estimator": "rows"},
    "tracerl_8b_math": MATH | LARGE,
    "tracerl_8b_code": MATH | LARGE | PROGRAMS,
    "tracerl_30b_a3b": MATH | EXPERTS,
    "tracerl_dream_code": PROGRAMS
    | {
        "model.model_preset": "dream-7b",
        "rl.shrinkage": 8,
        "rl.loss_aggregation": "slice",
        "rollout.rollout_batch_size": 56,
        "rollout.n_samples_per_prompt": 8,
        "rollout.rollout_block_size": 32,
        "rollout.denoising_steps": 32,
        "rollout.remasking": "static",
        "rollout.horizon": 128,
        "rollout.rollout_max_response_len": 1024,
        "rollout.rollout_temperature": 0.8,
        "rollout.rollout_top_p": 0.9,
        "rollout.rollout_top_k": 50,
        "optimizer.lr": 1e-6,
    },
    "block_expansion_4_to_8_phase1": MATH | SMALL | EXPANSION | {"rl.num_rollout": 60, "rollout.rollout_block_size": 4},
    "block_expansion_4_to_8_phase2": MATH
    | SMALL
    | EXPANSION
    | {"rl.num_rollout": 40, "rollout.rollout_block_size": None, "rollout.denoising_steps": 8},
    "reference_parity": MATH
    | SMALL
    | VALUE
    | {
        "rl.grid_anchor": "response",
        "rl.loss_aggregation": "longest",
        "rl.reset_optimizer": True,
        "rl.bf16_logprobs": True,
        "rl.learn_stop_token": False,
        "rl.shuffle_responses": False,
        "rl.normalize_advantages_by_std": True,
        "rl.old_logprobs": "recomputed",
        "rl.kl_aggregation": "same",
        "value.value_order": "before",
        "rollout.confidence": "sampled",
    },
}


def read(name: str) -> dict:
    flags = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    if name in SFT:
        return parse("sft", pick(*sft.SECTIONS), flags)
    config = parse("tracerl", pick(*tracerl.SECTIONS), flags)
    return config | {"rl": with_method(config["rl"])}


def test_every_file_is_in_the_table() -> None:
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_has_the_published_numbers(name: str) -> None:
    config = read(name)
    found = {key: getattr(config[key.split(".")[0]], key.split(".")[1]) for key in PUBLISHED[name]}
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", ALL)
def test_passes_a_dry_run_on_64_processes(name: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    file = str(ROOT / "configs" / f"{name}.yaml")
    command = "sft" if name in SFT else "tracerl"
    assert main([command, "--config", file, "--dry-run", "--dry-run-world-size", "64"]) == 0
    said = capsys.readouterr().out
    assert f"64 processes = {LAYOUTS.get(name, 'tensor 2 x pipeline 1 x data 32')}" in said
    if name in SFT:
        settings = read(name)["sft"]
        assert f"{settings.train_iters:,} updates of {settings.global_batch_size:,} samples" in said
    else:
        assert "4,096 responses" in said or "448 responses" in said
    assert "Not here: checkpoints/" in said or "Not here: runs/" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_response_fits_a_row(name: str) -> None:
    """With the copies that it has at most; under full attention at least one copy of the canvas."""
    config = read(name)
    model, rl, rollout = config["model"], config["rl"], config["rollout"]
    prompt, response = rollout.rollout_max_prompt_len, rollout.rollout_max_response_len
    if model.model_preset == "dream-7b":
        assert prompt + response <= rl.max_tokens_per_row
        return
    block = model.block_size or 4
    copies = {"random_masking": 1, "coupled": 2}.get(rl.rl_method, block)
    assert prompt + response + copies * (response + 2 * block) <= rl.max_tokens_per_row


@pytest.mark.parametrize("name", SFT)
def test_the_longest_sample_fits_a_row(name: str) -> None:
    """With its noisy copy; with room for another one, but for the longest."""
    config = read(name)["sft"]
    copies = 2 if config.seq_length > 4096 else 4
    assert copies * config.seq_length <= config.max_tokens_per_row


def test_phase_2_begins_where_phase_1_ends() -> None:
    first, second = (read(f"block_expansion_4_to_8_phase{n}")["checkpoint"] for n in (1, 2))
    assert second.load == first.save and second.finetune


RECIPES = {
    # 50 billion tokens, noised throughout, in blocks of 4
    "recipe_sdar_cpt": {"sft.noise_prompt": True, "model.block_size": 4, "model.logit_shift": 0},
    "recipe_sdar_sft": {"sft.noise_prompt": False, "sft.seq_length": 20480, "optimizer.lr": 1e-5},
    "recipe_fast_dllm_v2": {"model.block_size": 32, "model.logit_shift": 1, "sft.complementary_masks": True},
    "recipe_llada2_wsd": {"model.block_size": 32, "sft.noise_prompt": True},
    "recipe_llada2_sft": {"sft.min_mask_ratio": 0.3, "sft.max_mask_ratio": 0.8, "sft.complementary_masks": True},
    "recipe_nemotron": {
        "model.block_size": 64,
        "sft.train_iters": 12500,
        "sft.global_batch_size": 512,
        "optimizer.lr_wsd_decay_iters": 2500,
        "optimizer.adam_beta2": 0.95,
    },
    "recipe_stable_diffcoder": {"model.block_size": 4, "sft.max_loss_weight": 4, "sft.mask_at_least_one": True},
    "block_growth_jump": {"model.block_size": 64, "sft.block_size_schedule": None, "optimizer.lr": 1e-5},
    "block_growth_progressive": {"model.block_size": 64, "optimizer.lr": 1e-5},
    "sft_8b": {},
}


@pytest.mark.parametrize("name", SFT)
def test_recipes_have_the_numbers_of_their_papers(name: str) -> None:
    config = read(name)
    found = {key: getattr(config[key.split(".")[0]], key.split(".")[1]) for key in RECIPES[name]}
    assert found == RECIPES[name]


def test_amounts_and_sizes_of_recipes() -> None:
    cpt, nemotron = read("recipe_sdar_cpt")["sft"], read("recipe_nemotron")["sft"]
    assert cpt.train_iters * cpt.global_batch_size * cpt.seq_length == pytest.approx(50e9, rel=0.01)
    assert 1.0 / nemotron.ar_loss_coef == pytest.approx(0.3, rel=1e-3)  # diffusion against autoregressive
    sizes = [stage.split(":")[0] for stage in read("recipe_llada2_wsd")["sft"].block_size_schedule]
    assert sizes == ["1", "4", "32", "64", "full", *(str(2048 >> n) for n in range(7))]
    grown = [stage.split(":")[0] for stage in read("block_growth_progressive")["sft"].block_size_schedule]
    assert grown == ["8", "16", "32", "64"]
    assert read("block_growth_jump")["sft"].train_iters == read("block_growth_progressive")["sft"].train_iters


@pytest.mark.parametrize(
    ("first", "second"), [("recipe_sdar_cpt", "recipe_sdar_sft"), ("recipe_llada2_wsd", "recipe_llada2_sft")]
)
def test_fine_tuning_begins_where_pre_training_ends(first: str, second: str) -> None:
    one, other = read(first), read(second)
    assert other["checkpoint"].load == one["checkpoint"].save and other["checkpoint"].finetune
    assert one["model"] == other["model"]


def test_parity_differs_from_the_published_run_in_the_switches_alone() -> None:
    mine, theirs = read("tracerl_4b_math_value"), read("reference_parity")
    switches = {"grid_anchor", "loss_aggregation", "reset_optimizer", "bf16_logprobs", "learn_stop_token"}
    switches |= {"shuffle_responses"}
    places = {"save"}
    different = {
        field.name
        for section in mine
        for field in dataclasses.fields(mine[section])
        if getattr(mine[section], field.name) != getattr(theirs[section], field.name)
    }
    assert different == switches | places
