"""Messages between ranks, as the executors of older and of newer releases of megatron-core submit them."""

from __future__ import annotations

import pytest
import torch

from tests.harness import pool


def exchanged(with_id: bool) -> list[list[float]]:
    """Each rank sends the other three tensors, in two runs."""
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.rollout.transport import PointToPoint

    rank = initialize(ParallelConfig(), seed=1).rank
    service, received = PointToPoint(), []
    for numbers in ((0, 1), (2,)):
        for number in numbers:
            sent, buffer = torch.full((2,), 10.0 * rank + number), torch.empty(2)
            if with_id:
                service.submit_send_with_id(number, sent, 1 - rank)
                service.submit_recv_with_id(number, buffer, 1 - rank)
            else:
                service.submit_send(sent, 1 - rank, task_id=number)
                service.submit_recv(buffer, 1 - rank, task_id=number)
            received.append(buffer)
        service.run()
    service.run()  # nothing is left, and nothing is sent again
    return [buffer.tolist() for buffer in received]


@pytest.mark.parametrize("with_id", [True, False])
def test_both_ways_to_submit(with_id: bool) -> None:
    first, second = pool(2).run(exchanged, with_id)
    assert first == [[10.0, 10.0], [11.0, 11.0], [12.0, 12.0]]
    assert second == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_both_ends_list_a_batch_in_one_order() -> None:
    from megatron_dlm.rollout.reshard_plan import Copy
    from megatron_dlm.rollout.transport import operations

    batch = [Copy(name, source, 1 - source, ((0, 2),), ((2, 4),), 8) for name, source in (("a", 0), ("b", 1), ("c", 0))]
    here, there = operations(batch, 0), operations(batch, 1)
    assert [(one.param_name, one.task_id) for one in here.send_ops] == [("a", 0), ("c", 2)]
    for mine, theirs in ((here.send_ops, there.recv_ops), (there.send_ops, here.recv_ops)):
        assert [one.task_id for one in mine] == [one.task_id for one in theirs]
        for send, receive in zip(mine, theirs, strict=True):
            assert send.is_send and not receive.is_send and (send.peer_rank, receive.peer_rank) in ((1, 0), (0, 1))
            assert send.my_slice == receive.peer_slice == (slice(0, 2),)
            assert send.peer_slice == receive.my_slice == (slice(2, 4),)
