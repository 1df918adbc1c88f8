"""The RL methods: on which states of a response each of them learns, and whose probabilities it compares there.

    method          states                                      ratio of           source
    tracerl         those in which tokens were decided          each token         arXiv 2509.06949, eq. 3
    dipo            the same                                    each token         DiRL, arXiv 2512.22234
    opd             the same                                    none (a teacher)   arXiv 2306.13649; 2606.06712
    random_masking  masks of random ratio                       each target        arXiv 2509.06949, section 4.1
    coupled         pairs of complementary masks                target or token    arXiv 2506.20639
    slim_rl         masks at quadrature nodes, falling ratios   response (mean)    arXiv 2607.00208
    espo            pairs of complementary masks                response (/ len)   arXiv 2512.03759
    ebpo            masks at quadrature nodes                   response (sum)     arXiv 2602.08676

A method is two things: a function from a response to views, whose weights are the coefficients of the targets in what
is compared, and the unit of comparison. What else the papers differ in (normalisation, clipping, penalties) are
settings, with the defaults of config/objective.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.diffusion import draws
from megatron_dlm.diffusion.draws import MaskDraws
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item, Views, no_views, trace_views
from megatron_dlm.rl.normalise import Counts

TARGET, TOKEN, RESPONSE = "target", "token", "response"

Draw = Callable[[Trace, Grid, np.ndarray, int, MaskDraws], Views]


@dataclass(frozen=True, slots=True)
class Method:
    """Attributes:
    draw: the views of a response; None replays its trace.
    unit: what has one ratio: each target, the targets of one token, or all targets of a response.
    kl_times_length: whether the penalty on a response's log-ratio per token counts once for each token, so that the
        quadratic one is that of the whole log-ratio over the length (ESPO).
    """

    draw: Draw | None
    unit: str = TARGET
    kl_times_length: bool = False

    @property
    def follows_trace(self) -> bool:
        return self.draw is None


_METHODS = {
    "tracerl": Method(None),
    "dipo": Method(None),
    "opd": Method(None),
    "random_masking": Method(draws.random_views),
    "coupled": Method(draws.coupled_views),
    "slim_rl": Method(draws.quadrature_views, RESPONSE),
    "espo": Method(draws.elbo_views, RESPONSE, kl_times_length=True),
    "ebpo": Method(draws.bound_views, RESPONSE),
}
_PAIRED = Method(draws.paired_views, TOKEN)


def method_of(config: ObjectiveConfig) -> Method:
    if config.rl_method == "coupled" and config.coupled_estimator == "paired":
        return _PAIRED
    return _METHODS[config.rl_method]


@dataclass(frozen=True, slots=True)
class States:
    """From traces to items: which states of a response are learned in an RL step.

    Attributes:
        method, grid, seed. shrinkage: of replayed traces. draws: how masks are drawn.
        learn_stop_token: whether the token that ended a response is learned.
    """

    method: Method
    grid: Grid
    shrinkage: int = 1
    draws: MaskDraws = field(default_factory=MaskDraws)
    learn_stop_token: bool = True
    seed: int = 0

    @classmethod
    def of(cls, config: ObjectiveConfig, block_size: int | None, seed: int) -> States:
        """Args: config: with the fields of its method. block_size: of the model's attention."""
        masks = MaskDraws(
            config.mask_draws,
            config.mask_ratio_low,
            config.mask_ratio_high,
            config.mask_ratio_per,
            config.mask_ratio_spread,
        )
        grid = Grid(block_size, config.grid_anchor)
        return cls(method_of(config), grid, config.shrinkage, masks, config.learn_stop_token, seed)

    @property
    def copies(self) -> int:
        """Copies of each of its blocks that a response can have; of traces the caller knows how long they can be."""
        pairs = self.method.draw in (draws.coupled_views, draws.paired_views, draws.elbo_views)
        full = self.method.draw is draws.paired_views
        return self.draws.draws * (2 if pairs else 1) + full

    def learned(self, trace: Trace, oldest_version: int = 0) -> np.ndarray:
        """Which tokens of a response are learned, bool [R]. Args: as `item`."""
        learned = trace.weight_versions >= oldest_version
        if not self.learn_stop_token and trace.finish_reason == "stop":
            learned[-1] = False
        return learned

    def item(self, trace: Trace, step: int, oldest_version: int = 0) -> Item:
        """A trace, ready to be laid out.

        Args:
            step: of RL; masks are drawn anew in each.
            oldest_version: nothing is learned of tokens that weights before this decided.
        """
        learned = self.learned(trace, oldest_version)
        if self.method.draw is None:
            views = only(trace_views(trace, self.grid, self.shrinkage), learned, trace, self.grid)
        else:
            key = stream(self.seed, "rl-mask", step, trace.prompt_key, trace.sample)
            views = self.method.draw(trace, self.grid, learned, key, self.draws)
        return Item(trace.prompt_key, trace.tokens, len(trace.prompt_ids), views, self.grid)


def replay(grid: Grid, shrinkage: int = 1) -> States:
    """The states in which the tokens of a trace were decided: those of TraceRL."""
    return States(_METHODS["tracerl"], grid, shrinkage)


def counts_of(item: Item, unit: str) -> Counts:
    """What the normalisation of the loss must know of a response. Args: unit: of its method."""
    views = item.views
    tokens = len(np.unique(views.position[views.target]))
    units = {TARGET: views.num_targets, TOKEN: tokens, RESPONSE: int(views.num_targets > 0)}[unit]
    return Counts(views.num_targets, units, len(views.block), tokens)


def only(views: Views, learned: np.ndarray, trace: Trace, grid: Grid) -> Views:
    """The views with only those targets that are learned, bool [R]; views that have none left are dropped."""
    if learned.all():
        return views
    target = views.target.copy()
    target[target] = learned[views.position[target] - len(trace.prompt_ids)]
    kept = target.any(1)
    if not kept.any():
        return no_views(grid, len(trace.tokens))
    return Views(views.block[kept], views.position[kept], views.masked[kept], target[kept], views.weight[kept])
