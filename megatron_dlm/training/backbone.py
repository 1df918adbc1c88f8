"""Give one TrainState the weights that it shares with another: a value model its policy's backbone."""

from __future__ import annotations

import torch

from megatron_dlm.training.sleep import wake
from megatron_dlm.training.state import TrainState, adapters_by_weight, global_names


@torch.no_grad()
def copy_backbone(source: TrainState, target: TrainState) -> list[str]:
    """Copy every parameter and buffer of `target` that `source` has under the same name. Collective.

    Both have one layout, so each rank copies what it holds. What the source alone has (an output layer) is left out.
    The adapters of a source are merged into what is copied.

    Returns:
        Names of what `target` alone has on this rank; it stays as it was.

    Raises:
        ValueError: a tensor has another shape there.
    """
    source.gather_parameters()
    wake(target)  # the optimizer's copies follow
    there, left = _tensors(source), []
    adapters = adapters_by_weight(source)
    for name, tensor in _tensors(target).items():
        if name not in there:
            left.append(name)
            continue
        if there[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} here and {tuple(there[name].shape)} in the other model")
        tensor.copy_(adapters[name].merged(there[name]) if name in adapters else there[name])
    if target.optimizer is not None:
        target.optimizer.reload_model_params()
    return left


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers by their names in the whole model."""
    found = dict(state.named_parameters())
    for chunk in state.unwrapped_chunks():
        rename, stored = global_names(chunk), chunk.state_dict(keep_vars=True)
        found |= {rename(name): buffer for name, buffer in chunk.named_buffers() if name in stored}
    return found
