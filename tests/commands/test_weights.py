"""What a command takes over from the model that a checkpoint describes."""

from __future__ import annotations

from megatron_dlm.commands.weights import _fill
from megatron_dlm.config.model import ModelConfig


def test_overrides_of_a_checkpoint_are_taken_but_for_those_that_are_of_a_run() -> None:
    """Recomputation is another run's business: whoever gives its flags would else be told to give them once only."""
    stored = {"softmax_scale": 0.5, "recompute_granularity": "full", "recompute_method": "uniform"}
    model = ModelConfig(transformer_overrides={"add_bias_linear": True})
    _fill(model, {"transformer_overrides": stored, "num_layers": 3})
    assert model.transformer_overrides == {"softmax_scale": 0.5, "add_bias_linear": True} and model.num_layers == 3
    _fill(model := ModelConfig(transformer_overrides={"recompute_granularity": "selective"}), {"num_layers": 3})
    assert model.transformer_overrides == {"recompute_granularity": "selective"}
