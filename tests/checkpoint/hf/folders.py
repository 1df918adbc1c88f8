"""Small HuggingFace checkpoints, made without this package: by transformers, or from formulas and random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_SHAPE = dict(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.3,
    rope_theta=5e4,
    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
)
_EXPERTS = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)


def qwen3(tied: bool, experts: bool = False):
    """A random model of transformers."""
    import transformers

    torch.manual_seed(0)
    kind = "Qwen3Moe" if experts else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(
        **_SHAPE, **(_EXPERTS if experts else {}), tie_word_embeddings=tied, attn_implementation="sdpa"
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write(
    folder: Path, config: dict, weights: dict[str, Tensor], dtype: torch.dtype | None = None, files: int = 2
) -> Path:
    """Write weights and config.json, as `save_pretrained` would."""
    folder.mkdir()
    weights = {name: value.to(dtype or value.dtype).contiguous() for name, value in weights.items()}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    parts = [names[index::files] for index in range(files)]
    if files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def make(kind: str, folder: Path) -> Path:
    """A checkpoint of a family; bf16 where the published ones are."""
    from tests.model import family_oracles as oracles

    if kind in ("llada", "dream", "llada2"):
        config = getattr(oracles, kind.upper())
        weights = getattr(oracles, f"random_{kind}_weights")(config)
        architecture = {"llada": "LLaDAModelLM", "dream": "DreamModel", "llada2": "LLaDA2MoeModelLM"}[kind]
        config = config | {"architectures": [architecture], "torch_dtype": "bfloat16"}
        write(folder, config, weights, torch.bfloat16)
    elif kind in ("sdar", "sdar-moe"):
        model = qwen3(tied=False, experts=kind == "sdar-moe")
        experts = _EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []}
        config = {name: value for name, value in _SHAPE.items() if name != "rope_parameters"}
        config |= {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "tie_word_embeddings": False}
        config |= {"auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}, "hidden_act": "silu"}
        config |= {"attention_bias": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
        if kind == "sdar-moe":
            config |= experts | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}
        write(folder, config, per_expert(model), torch.bfloat16, files=3)
        (folder / "modeling_sdar.py").write_text("# code of the checkpoint\n")
    else:
        model = qwen3(tied=kind == "qwen3-tied", experts=kind == "qwen3-moe")
        model.to(torch.float32 if kind == "qwen3-moe" else torch.bfloat16).save_pretrained(
            folder, max_shard_size="60KB"
        )
    return folder


def per_expert(model) -> dict[str, Tensor]:
    """The weights of a model of transformers under the names that its checkpoints have."""
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                weights |= {name.replace("gate_up_proj", f"{expert}.gate_proj.weight"): gate}
                weights |= {name.replace("gate_up_proj", f"{expert}.up_proj.weight"): up}
        elif name.endswith("mlp.experts.down_proj"):
            weights |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(value)}
        else:
            weights[name] = value
    return weights


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the safetensors package."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


KINDS = ("sdar", "sdar-moe", "qwen3", "qwen3-tied", "qwen3-moe", "llada", "dream", "llada2")
