"""Which processes work together: the groups of the training layout and of the rollout layout.

`initialize` makes them once per process, from torchrun's environment or for a single process, and hands out a `Groups`
that everything above gets as an argument. Nothing outside this folder asks megatron-core's parallel_state.

Ranks are laid out as in Megatron, fastest first: tensor, context, expert, data, pipeline. So the ranks of one pipeline
group agree in their tensor, context, expert and data coordinates; together they hold one whole (tensor-sharded) model,
or several virtual stages of it each. The ranks of a context-parallel group hold the same parameters, like data-parallel
ones, but share the rows of one data rank.

The rollout layout has all layers on each rank, and its own tensor and expert sizes: ranks that follow each other are a
model, and with the sizes of training a rank has the tensor and expert shards that it trains, so refit moves only what
its pipeline stage lacks.

Invariants (tests/parallel/test_groups.py):
  - tp_size x pp_size x dp_size is the world size; `dp` counts context-parallel ranks, because each of them adds
    gradients of its own; dp_size is cp_size x data_size;
  - the rollout layout has world_size / tp_size replicas; with the sizes of training, its tensor and expert groups.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.parallel import meeting
from megatron_dlm.parallel.alike import compare_processes

_rollout_groups: list[dist.ProcessGroup] = []  # made here, so destroyed here


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of this process in one layout, with sizes and ranks as plain integers.

    `dp` spans all ranks that hold the same parameters and see different tokens (context-parallel ranks included); `cp`
    those of them that share rows. `pg_collection` is the same for megatron-core: pass it to models, DDP, optimizer and
    schedule. `timeout`: how long an operation of any group waits for the other ranks.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pg_collection: ProcessGroupCollection
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    ep_size: int
    timeout: timedelta

    @property
    def data_rank(self) -> int:
        """Which rows: of the ranks with the same number each holds a part of them."""
        return self.dp_rank // self.cp_size

    @property
    def data_size(self) -> int:
        return self.dp_size // self.cp_size

    @property
    def is_pipeline_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_pipeline_last(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which writes files and speaks for the job."""
        return self.rank == 0


def initialize(parallel: ParallelConfig, seed: int) -> Groups:
    """Join the job and make the groups of the training layout; seed the generators of dropout and weight
    initialisation.

    Under torchrun (RANK is set) the environment says where to meet; otherwise this is a job of one process. The default
    process group is kept if there already is one. Collective: every rank calls it with the same configuration.

    Raises:
        ConfigError: the world size is not a multiple of tensor x context x pipeline parallel size, or of the expert
            layout.
        DependencyError: the processes do not have the same Transformer Engine.
    """
    platform.install()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        _join(timeout, parallel.host_timeout_seconds)
    tp, pp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    cp = parallel.context_parallel_size
    world = dist.get_world_size()
    if world % (tp * cp * pp):
        raise ConfigError(
            f"{world} processes cannot be divided into models of --tensor-model-parallel-size {tp} x "
            f"--context-parallel-size {cp} x --pipeline-model-parallel-size {pp}. "
            f"Start a multiple of {tp * cp * pp} processes."
        )
    expert_tp = parallel.expert_tensor_parallel_size or tp
    if world % (ep * expert_tp * pp):
        raise ConfigError(
            f"{world} processes cannot be divided into experts of --expert-model-parallel-size {ep} x "
            f"--expert-tensor-parallel-size {expert_tp} "
            f"x --pipeline-model-parallel-size {pp}. Start a multiple of {ep * expert_tp * pp} processes."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    # Until every rank has come this far none may leave, not even over a mistake: the others still ask rank 0's store.
    dist.barrier()
    compare_processes()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return _describe(ProcessGroupCollection.use_mpu_process_groups(), timeout)


def rollout_groups(training: Groups, tensor_size: int | None = None, expert_size: int | None = None) -> Groups:
    """The groups of the rollout layout: no pipeline, everything that is not tensor or expert parallel is data parallel.
    Collective.

    Where ranks do not share out the experts, tensor-parallel ranks split each, as they split other layers. Where they
    do, an expert is split as in training if as many ranks share them there, otherwise not at all. Where nothing differs
    from the training layout, `training` itself is returned.

    Args:
        tensor_size, expert_size: tensor- and expert-parallel size; None as in training.

    Raises:
        ConfigError: a size that does not divide the world size.
    """
    trained, world = training.pg_collection, training.world_size
    tensor = tensor_size or training.tp_size
    experts = expert_size or training.ep_size
    for size, flag in (
        (tensor, "--rollout-tensor-model-parallel-size"),
        (experts, "--rollout-expert-model-parallel-size"),
    ):
        if world % size:
            raise ConfigError(
                f"{world} processes cannot be divided into rollout models of {flag} {size}. Use a size that divides "
                f"{world}."
            )
    shard = tensor if experts == 1 else trained.expt_tp.size() if experts == training.ep_size else 1
    same_experts = (experts, shard) == (training.ep_size, trained.expt_tp.size())
    if training.pp_size == 1 and tensor == training.tp_size and same_experts:
        return training
    ranks, split = range(world), partial(_new_groups, timeout=training.timeout)
    alone = split([[rank] for rank in ranks])
    replicas = split([list(ranks[place::tensor]) for place in range(tensor)])
    tp = trained.tp if tensor == training.tp_size else split(_blocks(world, tensor))
    if experts == 1:
        ep, expert_tp, tp_ep, expert_replicas = alone, tp, tp, replicas
    else:
        size = experts * shard
        expert_replicas = split([list(ranks[place::size]) for place in range(size)])
        if same_experts:
            ep, expert_tp, tp_ep = trained.ep, trained.expt_tp, trained.tp_ep
        else:
            tp_ep = split(_blocks(world, size))
            expert_tp = split(_blocks(world, shard))
            ep = split([block[place::shard] for block in _blocks(world, size) for place in range(shard)])
    collection = ProcessGroupCollection(
        tp=tp,
        pp=alone,
        mp=tp,
        embd=alone,
        pos_embd=alone,
        cp=alone,
        tp_cp=tp,
        hcp=None,
        ep=ep,
        expt_tp=expert_tp,
        tp_ep=tp_ep,
        tp_ep_pp=tp_ep,
        tp_dp_cp=dist.group.WORLD,
        dp=replicas,
        dp_cp=replicas,
        expt_dp=expert_replicas,
        intra_dp_cp=replicas,
        intra_expt_dp=expert_replicas,
        inter_dist_opt=None,
        intra_dist_opt=dist.group.WORLD,
    )
    return _describe(collection, training.timeout)


def destroy(keep_world: bool = False) -> None:
    """Leave all groups; with `keep_world` the default group stays, and `initialize` may make another layout in it."""
    made = {id(group): group for group in _process_groups(vars(parallel_state).values())}
    made.update((id(group), group) for group in _rollout_groups)
    _rollout_groups.clear()
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    meeting.stop_watching(leaving=True)
    for group in made.values():
        if group is not dist.group.WORLD and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    if not keep_world:
        dist.destroy_process_group()


def _join(timeout: timedelta, silence: float) -> None:
    """Make the default process group: torchrun's, or one of a single process. `silence`: see `meeting.meet`."""
    options = {"device_id": platform.device()} if platform.is_cuda() else {}
    if "RANK" in os.environ:
        _check_meeting_place(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        meeting.check_interface()
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            if meeting.several_hosts():
                options |= {"store": meeting.meet(timeout, silence), "rank": rank, "world_size": world}
            elif (store := meeting.store_of_part(timeout)) is not None:
                options |= {"store": store, "rank": rank, "world_size": world}
            dist.init_process_group(platform.backend(), timeout=timeout, **options)
        except dist.DistError as error:
            reason = str(error).strip().splitlines()[0][:200].rstrip(".")
            raise ConfigError(
                f"The processes of this job cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                f"({reason}). Check MASTER_ADDR and MASTER_PORT, and that all {os.environ['WORLD_SIZE']} were started."
            ) from error
    else:
        dist.init_process_group(
            platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, **options
        )


def _check_meeting_place(host: str, port: int) -> None:
    """Refuse at once what torch would try again and again, for minutes.

    Raises:
        ConfigError: nobody knows the host, or another program has the port.
    """
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR {host} is not known here ({error.strerror}). Give the name or address of the host of rank 0."
        ) from None
    if int(os.environ["RANK"]) != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # another process opens the port: rank 0, or torchrun, which has done so
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(f"MASTER_PORT {port} cannot be opened ({error.strerror}). Use another one.") from None


def _describe(collection: ProcessGroupCollection, timeout: timedelta) -> Groups:
    tp, pp, dp, cp = collection.tp, collection.pp, collection.dp_cp, collection.cp
    return Groups(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        pg_collection=collection,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=tp.rank(),
        tp_size=tp.size(),
        pp_rank=pp.rank(),
        pp_size=pp.size(),
        dp_rank=dp.rank(),
        dp_size=dp.size(),
        cp_rank=cp.rank(),
        cp_size=cp.size(),
        ep_size=collection.ep.size(),
        timeout=timeout,
    )


def _new_groups(partition: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Split the world into the given lists of ranks; returns the group of this rank. Collective."""
    parts = [list(ranks) for ranks in partition]
    mine, _ = dist.new_subgroups_by_enumeration(parts, timeout=timeout, backend=platform.backend())
    _rollout_groups.append(mine)
    return mine


def _blocks(world: int, size: int) -> list[list[int]]:
    """The world in runs of `size` ranks that follow each other."""
    return [list(range(first, first + size)) for first in range(0, world, size)]


def _process_groups(values: Iterable[object]) -> list[dist.ProcessGroup]:
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, dist.ProcessGroup)]
