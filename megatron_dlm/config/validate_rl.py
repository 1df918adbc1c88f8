"""What cannot work in RL, refused before anything is built.

The rules of these checks are those of `validate`.
"""

from __future__ import annotations

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name, one_of
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig, with_method
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate import above, at_least, needs_data, within
from megatron_dlm.config.value import ValueConfig

DRAWN = ("random_masking", "coupled", "slim_rl", "espo", "ebpo")  # learn states that are drawn
REPLAYED = ("tracerl", "dipo")  # reward the decisions of the trace
WHOLE = ("slim_rl", "espo", "ebpo")  # compare whole responses


def check_rl(rl: RLConfig, rollout: RolloutConfig, model: ModelConfig) -> None:
    """Refuse RL settings that cannot work with this rollout and this model."""
    needs_data(rl.prompt_data, "--prompt-data", "prompt source")
    at_least(rl, 1, "num_rollout", "global_batch_size", "num_steps_per_rollout", "max_tokens_per_row", "shrinkage")
    at_least(rl, 1, "max_empty_steps")
    at_least(rl, 0, "overlong_margin", "log_samples")
    within(rl, 0, 1, "min_group_accuracy", "max_group_accuracy")
    check_objective(rl)
    rl = with_method(rl)
    if rl.min_group_accuracy > rl.max_group_accuracy:
        raise ConfigError(
            f"--min-group-accuracy {rl.min_group_accuracy} is above --max-group-accuracy "
            f"{rl.max_group_accuracy}. Swap them."
        )
    if rollout.n_samples_per_prompt < 2 and rl.policy_loss_coef:
        raise ConfigError(
            "--n-samples-per-prompt 1 gives RL nothing to learn from, for advantages compare the "
            "responses to one prompt. Use 2 or more."
        )
    if rollout.rollout_temperature == 0:
        raise ConfigError(
            "--rollout-temperature 0 gives RL nothing to learn from, for all responses to a prompt are then the same. "
            "Use a temperature above 0."
        )
    if rl.overlong_margin >= rollout.rollout_max_response_len:
        raise ConfigError(
            f"--overlong-margin {rl.overlong_margin} would count every response as too long. "
            f"Use less than --rollout-max-response-len {rollout.rollout_max_response_len}."
        )
    _check_update_size(rl, rollout)
    if rl.old_logprobs == "rollout":
        _check_rollout_logprobs(rl, rollout, model)


def check_sections(rl: RLConfig, value: ValueConfig, reward: RewardConfig, curriculum: CurriculumConfig) -> None:
    """Refuse sections of RL settings that contradict each other."""
    process = reward.process_reward is not None
    flag = "--use-value-model" if value.use_value_model else "--process-reward" if process else None
    if flag and rl.rl_method not in REPLAYED:
        raise ConfigError(
            f"{flag} gives advantages to single tokens along the trace, and --rl-method {rl.rl_method} does not follow "
            f"it. Use {one_of(REPLAYED)}, or leave {flag} out."
        )
    others = ("format_reward", "overlong_buffer_len", "short_reward_coef", "speed_reward_coef")
    for name in others if process else ():
        if getattr(reward, name):
            raise ConfigError(
                f"--process-reward makes the advantages by itself, so {flag_name(name)} would do nothing. Leave one of "
                "the two out."
            )
    if curriculum.dynamic_sampling and not with_method(rl).policy_loss_coef:
        raise ConfigError(
            "--dynamic-sampling looks for groups with right and wrong responses, and a teacher alone has something to "
            "say of all. Leave it out, or set --policy-loss-coef above 0."
        )


def check_objective(config: ObjectiveConfig) -> None:
    """Refuse objectives that contradict themselves."""
    within(config, 0, 1, "eps_clip", low_open=True, high_open=True)
    above(config, 0, "eps_clip_high")
    above(config, 1, "eps_clip_c")
    at_least(
        config,
        0,
        "kl_loss_coef",
        "policy_loss_coef",
        "distill_coef",
        "tis_clip_low",
        "mask_ratio_spread",
        "entropy_coef",
    )
    at_least(config, 1, "mask_draws", "shrinkage")
    above(config, 0, "tis_clip")
    within(config, 0, 1, "mask_ratio_low", "mask_ratio_high", low_open=True)
    if config.mask_ratio_low > config.mask_ratio_high:
        raise ConfigError(
            f"--mask-ratio-low {config.mask_ratio_low} is above --mask-ratio-high {config.mask_ratio_high}. Swap them."
        )
    if config.tis_clip_low > config.tis_clip:
        raise ConfigError(f"--tis-clip-low {config.tis_clip_low} is above --tis-clip {config.tis_clip}. Swap them.")
    _check_read(config)
    config = with_method(config)
    method = config.rl_method
    _check_states(config, method)
    _check_frozen(config, method)
    if not (config.policy_loss_coef or config.distill_coef):
        raise ConfigError(
            "--policy-loss-coef 0 and no --distill-coef leave nothing to learn. Set one of the two above 0."
        )
    if method in WHOLE and config.loss_aggregation not in ("response", "token"):
        raise ConfigError(
            f"--loss-aggregation {config.loss_aggregation} does not work with --rl-method {method}, which compares "
            "whole responses. Use response or token."
        )
    if config.loss_aggregation == "slice" and _is_paired(config):
        raise ConfigError(
            "--loss-aggregation slice does not work with --coupled-estimator paired, whose tokens stand in several "
            "slices each. Use constant, longest, response or token."
        )
    if config.kl_aggregation == "slice_sum" and (method in WHOLE or _is_paired(config)):
        raise ConfigError(
            f"--kl-aggregation slice_sum needs a penalty for each target, and --rl-method {method} has one for what it "
            "compares as a whole. Leave it out."
        )
    if config.use_tis and not (method in REPLAYED and config.shrinkage == 1 and config.grid_anchor == "absolute"):
        raise ConfigError(
            "--use-tis compares a token's probability in training with that in the rollout, so it needs the states of "
            f"the rollout: --rl-method {one_of(REPLAYED)}, --shrinkage 1 and --grid-anchor absolute. Leave it out."
        )
    if config.use_tis and config.old_logprobs == "rollout":
        raise ConfigError(
            "--use-tis corrects the difference between the old policy and the rollout, and --old-logprobs rollout says "
            "that there is none. Leave one of the two out."
        )


def _is_paired(config: ObjectiveConfig) -> bool:
    return config.rl_method == "coupled" and config.coupled_estimator == "paired"


def _check_read(config: ObjectiveConfig) -> None:
    """Refuse settings that nobody reads. Args: config: as the user gave it."""
    filled = with_method(config)
    on_policy = filled.old_logprobs == "current" or not filled.policy_loss_coef
    rules = [
        (("tis_clip", "tis_clip_low"), config.use_tis, "without --use-tis"),
        (("distill_kl",), filled.distill_coef, "without --distill-coef"),
        (("kl_loss_type", "kl_aggregation"), filled.kl_loss_coef, "with --kl-loss-coef 0"),
        (("eps_clip", "eps_clip_high", "eps_clip_c"), not on_policy, "where every ratio is 1, or --policy-loss-coef 0"),
        (("use_tis",), filled.policy_loss_coef, "with --policy-loss-coef 0"),
    ]
    defaults = ObjectiveConfig()
    for names, is_read, where in rules:
        for name in names:
            if not is_read and getattr(config, name) != getattr(defaults, name):
                raise ConfigError(f"{flag_name(name)} does nothing {where}. Leave it out.")
    still = filled.old_logprobs == "current" and filled.kl_reference == "old" and filled.kl_loss_type != "k1"
    if config.kl_loss_coef and still:
        raise ConfigError(
            f"--kl-loss-coef {filled.kl_loss_coef} does nothing with --old-logprobs current, for the policy is then no "
            "way from the old one. Add --kl-reference frozen, or leave it out."
        )


def _check_states(config: ObjectiveConfig, method: str) -> None:
    """Refuse what would be ignored: settings of drawn states where traces are replayed, and the other way round."""
    defaults = ObjectiveConfig()
    replayed = ("shrinkage",)
    drawn = ("mask_ratio_per", "mask_ratio_low", "mask_ratio_high")
    unread = replayed if method in DRAWN else (*drawn, "mask_ratio_spread", "coupled_estimator")
    if method not in DRAWN and config.mask_draws != 1:
        unread = (*unread, "mask_draws")
    if method in ("slim_rl", "ebpo"):
        unread = (*unread, *drawn)
    if method in DRAWN and method != "slim_rl":
        unread = (*unread, "mask_ratio_spread")
    if method in DRAWN and method != "coupled":
        unread = (*unread, "coupled_estimator")
    for name in unread:
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(f"{flag_name(name)} does nothing with --rl-method {method}. Leave it out.")
    if method == "espo" and config.mask_ratio_high == 1:
        raise ConfigError(
            "--mask-ratio-high 1 does not work with --rl-method espo, which divides by what a mask leaves. Use less "
            "than 1."
        )


def _check_frozen(config: ObjectiveConfig, method: str) -> None:
    if config.kl_reference == "frozen":
        if config.ref_load is None:
            raise ConfigError("--kl-reference frozen needs --ref-load. Give the folder of the reference model.")
        if not config.kl_loss_coef:
            raise ConfigError(
                f"--kl-reference frozen does nothing, for --kl-loss-coef is {config.kl_loss_coef} with --rl-method "
                f"{method}. Set it above 0, or leave --kl-reference out."
            )
    elif config.ref_load is not None:
        raise ConfigError("--ref-load does nothing without --kl-reference frozen. Add it, or leave --ref-load out.")
    if config.distill_coef and config.teacher_load is None:
        raise ConfigError(
            f"--distill-coef {config.distill_coef} needs --teacher-load. Give the folder of the teacher."
            if method != "opd"
            else "--rl-method opd needs --teacher-load. Give the folder of the teacher."
        )
    if config.teacher_load is not None and not config.distill_coef:
        raise ConfigError(
            f"--teacher-load does nothing with --rl-method {method} and no --distill-coef. Set that above 0, or leave "
            "--teacher-load out."
        )


def _check_update_size(rl: RLConfig, rollout: RolloutConfig) -> None:
    if (rl.global_batch_size is None) == (rl.num_steps_per_rollout is None):
        given = "neither is" if rl.global_batch_size is None else "both are"
        raise ConfigError(
            "The size of an update is given by --global-batch-size (responses) or by "
            f"--num-steps-per-rollout (updates per RL step), and {given} given. Give exactly one."
        )
    responses = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    sizes = {"--global-batch-size": rl.global_batch_size, "--num-steps-per-rollout": rl.num_steps_per_rollout}
    for flag, value in sizes.items():
        if value is not None and value > responses:
            raise ConfigError(
                f"{flag} {value} is more than the {responses} responses of an RL step "
                f"(--rollout-batch-size x --n-samples-per-prompt). Use at most {responses}."
            )


def _check_rollout_logprobs(rl: RLConfig, rollout: RolloutConfig, model: ModelConfig) -> None:
    """They are the old policy's if training sees each token in the state in which the rollout decided it. With another
    decoding block they are the behaviour's, which ratios may be of as well."""
    flag = "--old-logprobs rollout"
    if rl.rl_method in DRAWN:
        raise ConfigError(
            f"{flag} does not work with --rl-method {rl.rl_method}, which learns states that the rollout never saw. "
            "Use recomputed or current."
        )
    if rl.shrinkage != 1:
        raise ConfigError(
            f"{flag} works only with --shrinkage 1, not {rl.shrinkage}, which merges decoding states. "
            "Use 1, or --old-logprobs recomputed."
        )
    if rl.grid_anchor != "absolute":
        raise ConfigError(
            f"{flag} works only with --grid-anchor absolute, the grid of generation, not "
            f"{rl.grid_anchor}. Use absolute, or --old-logprobs recomputed."
        )
    if model.full_attention and rollout.prefix_cache:
        raise ConfigError(
            f"{flag} works under full attention only with --no-prefix-cache, for a cached prefix is older than the "
            "state. Add it, or use --old-logprobs recomputed."
        )
    if model.bf16:
        raise ConfigError(
            f"{flag} does not work with --bf16, in whose rounding the rollout's log-probabilities differ from those of "
            "training. Leave --bf16 out, or use --old-logprobs recomputed."
        )
