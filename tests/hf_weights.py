"""LLaMA weights under their Hugging Face names, as a parameter tree of ours and its shape."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pangu_tiny.model.shape import ModelShape


def to_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes."""
    return ModelShape(
        depth=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn_width=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        series_terms=config.get("series_terms", 1),
        shortcut_ratio=config.get("shortcut_ratio", 0),
    )


def to_params(weights: Mapping[str, np.ndarray], shape: ModelShape) -> dict[str, Any]:
    """The tree; matrices are transposed, since ours multiply from the right."""
    d, k = shape.width, shape.head_dim

    def layers(name: str, *size: int) -> np.ndarray:
        names = [f"model.layers.{layer}.{name}.weight" for layer in range(shape.depth)]
        return np.stack([weights[name].T.reshape(size) for name in names])

    padding = shape.padded_vocab - shape.vocab_size
    params = {
        "embedding": {
            "table": np.pad(weights["model.embed_tokens.weight"], ((0, padding), (0, 0)))
        },
        "blocks": {
            "attention_norm": {"scale": layers("input_layernorm", d)},
            "attention": {
                "query": layers("self_attn.q_proj", d, shape.heads, k),
                "key": layers("self_attn.k_proj", d, shape.kv_heads, k),
                "value": layers("self_attn.v_proj", d, shape.kv_heads, k),
                "out": layers("self_attn.o_proj", shape.heads, k, d),
            },
            "ffn_norm": {"scale": layers("post_attention_layernorm", d)},
            "ffn": {
                "gate": layers("mlp.gate_proj", d, shape.ffn_width),
                "up": layers("mlp.up_proj", d, shape.ffn_width),
                "down": layers("mlp.down_proj", shape.ffn_width, d),
            },
        },
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    if shape.shortcut_ratio:
        r = shape.bottleneck
        params["blocks"]["shortcut"] = {
            "down": layers("self_attn.shortcut.down", d, r),
            "up": layers("self_attn.shortcut.up", r, d),
        }
    if shape.series_terms > 1:
        for name in ("scale", "bias"):
            stored = f"model.layers.{{}}.mlp.act_fn.{name}"
            params["blocks"]["ffn"][f"series_{name}"] = np.stack(
                [weights[stored.format(layer)] for layer in range(shape.depth)]
            )
    if not shape.tied:
        params["head"] = {"kernel": np.pad(weights["lm_head.weight"].T, ((0, 0), (0, padding)))}
    return params
