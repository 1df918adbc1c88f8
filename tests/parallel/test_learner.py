"""Updates of every kind in every layout, against one process: what the learner prepares, and float64 gradients of it.

Methods whose ratio is that of a token or of a whole response, entropy, a frozen reference, teachers that read the
policy's rows and teachers that read their own, and responses that are split over rows beside a value model. All layouts
start from the same weights; traces lie on all ranks, and move to those that train on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.diffusion.oracles import PAD_ID
from tests.harness import pool
from tests.small_model import whole
from tests.tiny import Words, model_config, vocabulary

FULL = dict(full_attention=True, block_size=None)
AUTOREGRESSIVE = dict(block_size=1, logit_shift=1)


@dataclass(frozen=True)
class Job:
    """An update: settings of the objective, the policy's attention, tokens of a row, and the models beside it."""

    config: dict
    policy: dict = field(default_factory=dict)
    budget: int = 96
    teacher: dict | None = None
    value: bool = False


PAIRED = dict(rl_method="coupled", coupled_estimator="paired", mask_draws=2)
FROZEN = dict(kl_reference="frozen", kl_loss_coef=0.5)
JOBS = {
    "paired": Job(PAIRED, budget=128),
    "slim_rl": Job(dict(rl_method="slim_rl", kl_loss_coef=0.1), budget=128),
    "espo and a reference": Job(dict(rl_method="espo", **FROZEN), budget=128),
    "a reference and entropy": Job(dict(entropy_coef=0.5, **FROZEN)),
    "a teacher of the same blocks": Job(dict(rl_method="opd", distill_kl="jsd"), teacher={}),
    "a teacher of larger blocks": Job(dict(rl_method="opd", distill_kl="forward"), teacher=dict(block_size=8)),
    "an autoregressive teacher": Job(dict(distill_coef=0.5), teacher=AUTOREGRESSIVE),
    "values": Job(dict(entropy_coef=0.1, kl_loss_coef=0.1), value=True),
    "split over rows, with values": Job(dict(entropy_coef=0.1), FULL, 24, value=True),
    "split over rows, with a teacher": Job(dict(rl_method="opd"), FULL, 24, teacher=AUTOREGRESSIVE),
}
LAYOUTS = {
    "tp2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "dp2": (2, dict()),
    "pp2 vpp2": (2, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)),
    "cp2 tp2 sp": (4, dict(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)),
}
SHARED = {name for name, job in JOBS.items() if job.policy != FULL}
"""Jobs that context parallelism is for."""


class Maker:
    """Makes models of one layout, float64 and without optimizers, all with weights of a checkpoint."""

    def __init__(self, parallel: dict, folder: Path | None) -> None:
        from megatron_dlm.config.parallel import ParallelConfig
        from megatron_dlm.parallel.groups import initialize

        self.parallel, self.folder = ParallelConfig(**parallel), folder
        self.groups = initialize(self.parallel, seed=1)

    def session(self, **changes: object):
        from megatron_dlm.training.setup import Session

        model = model_config(**dict(num_layers=4, init_method_std=0.3) | changes)
        return Session(model, self.parallel, Words(), self.groups, vocabulary())

    def state(self, weights: str, value: bool = False, **changes: object):
        from megatron_dlm.checkpoint.distributed import load
        from megatron_dlm.model.block_diffusion import BlockDiffusionModel
        from megatron_dlm.model.shape import model_shape, transformer_config
        from megatron_dlm.model.value import ValueModel
        from megatron_dlm.training.state import TrainState

        model, kind = self.session(**changes).model, ValueModel if value else BlockDiffusionModel
        config = transformer_config(model, self.parallel, dtype=torch.float64)

        def build(pre_process: bool, post_process: bool, vp_stage: int | None):
            return kind(config, model_shape(model), self.groups.pg_collection, pre_process, post_process, vp_stage)

        state = TrainState.build(build, config, None, self.parallel, self.groups, 10)
        if self.folder is not None:
            load(state, self.folder / weights, with_optimizer=False)
        return state


def begin(folder: Path) -> None:
    """Weights of three models, wide enough that nothing is flat."""
    from megatron_dlm.checkpoint.distributed import save
    from tests.tiny import disturb

    maker = Maker({}, None)
    for seed, name in enumerate(("policy", "frozen", "value")):
        state = maker.state("", value=name == "value")
        disturb(state.module, seed)
        save(state, folder / name, 0, {}, with_optimizer=False)


def update_of(maker: Maker, job: Job):
    """The models of a job, this rank's rows of its update, and the update's settings."""
    from megatron_dlm.config.rl import RLConfig
    from megatron_dlm.config.value import ValueConfig
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.rl.exchange import gather_graded
    from megatron_dlm.rl.learner import Learner, Models
    from megatron_dlm.rl.teacher import Teacher
    from megatron_dlm.rl.update import with_old_logprobs
    from tests.rl.learning import SEED, advantages_of, records_of, responses, settings_of

    groups, block = maker.groups, job.policy.get("block_size", 4)
    settings = settings_of(RLConfig(**job.config), block, job.budget)
    teacher = None
    if job.teacher is not None:
        model = maker.session(**job.teacher).model
        teacher = Teacher(maker.state("frozen", **job.teacher), model, Grid(block))
    models = Models(
        maker.state("policy", **job.policy),
        maker.state("value", value=True, **job.policy) if job.value else None,
        maker.state("frozen", **job.policy) if "kl_reference" in job.config else None,
        teacher,
    )
    learner = Learner(maker.session(**job.policy), models, ValueConfig(gamma=0.9, gae_lambda=0.7), SEED)
    traces = responses(4, full=block is None)
    mine = traces[groups.rank :: groups.world_size]
    records = gather_graded(records_of(mine, settings, groups.rank))
    (update,) = learner.prepare(records, advantages_of(traces), mine, settings)
    # An old policy at some distance, so that ratios differ from 1. Stages without a loss know no old log-probabilities.
    shift = lambda row: 0.4 * torch.sin(row.row.targets.index.double() + row.row.targets.label.double())
    rows = [
        row if row.old_logprob is None else dataclasses.replace(row, old_logprob=row.old_logprob + shift(row))
        for row in with_old_logprobs(models.policy, update.rows, update.length, vocabulary(), settings)
    ]
    return models, dataclasses.replace(update, rows=rows), settings


def gradients_of(parallel: dict, folder: Path, names: list[str]) -> dict[str, tuple]:
    """For each job what is asked of all layouts: metrics and whole gradients, of the policy and of the value model."""
    from megatron_dlm.rl.update import policy_forward
    from megatron_dlm.rl.value import ValueSettings, value_forward
    from megatron_dlm.training.step import accumulate_gradients

    maker, found = Maker(parallel, folder), {}
    for name in names:
        models, update, settings = update_of(maker, JOBS[name])
        grads = lambda state: whole(state, {name: one.main_grad for name, one in state.named_parameters()})
        forward = policy_forward(vocabulary(), settings, models.teacher)
        metrics = accumulate_gradients(models.policy, update.rows, forward, update.length)
        gathered = grads(models.policy)
        if models.value is not None:
            values = ValueSettings(0.05, 0.9, 0.7)
            learned = accumulate_gradients(models.value, update.value_rows, value_forward(values), update.length)
            metrics |= {f"value {name}": number for name, number in learned.items()}
            gathered |= {f"value {name}": one for name, one in grads(models.value).items()}
        parts = {(r, row) for row, one in enumerate(update.rows) for r in one.row.targets.response.tolist()}
        responses = [r for r, _ in parts]
        found[name] = metrics, gathered, max(map(responses.count, responses)), set(responses)
        assert all((row.row.tokens[row.row.layout.group < 0] == PAD_ID).all() for row in update.rows)
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    pool(1).run(begin, folder)
    return folder


@pytest.fixture(scope="module")
def alone(start) -> dict[str, tuple]:
    return pool(1).run(gradients_of, {}, start, list(JOBS))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(start, alone, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    names = [name for name in JOBS if "cp" not in layout or name in SHARED]
    results = pool(world).run(gradients_of, parallel, start, names)
    for name, job in ((name, JOBS[name]) for name in names):
        metrics, expected, _, everyone = alone[name]
        if layout == "dp2":
            one, other = (result[name][3] for result in results)
            assert one | other == everyone and one and other
            assert not (job.value and one & other), "all of a response's tokens are on one rank"
        for result in results:
            found_metrics, found, rows, _ = result[name]
            assert rows > 1 or job.policy != FULL, "no response lies in several rows"
            for key, value in metrics.items():
                assert found_metrics[key] == pytest.approx(value, rel=1e-9, abs=1e-11), (name, key)
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                assert gradient.norm() > 0, (name, key)
                assert (found[key] - gradient).norm() < 1e-10 * gradient.norm(), (name, key)
