"""Makes llama.npz and pangu_pi.npz: random weights of LlamaForCausalLM, and with the modules of
PanGu-π by the code that export-hf ships, and their logits, as transformers computes them.

python tests/golden/make_llama.py       (needs the extra [parity])
"""

import json
import pathlib
from typing import Any

import numpy as np

GOLDEN, MODULES_GOLDEN = (
    pathlib.Path(__file__).with_name(name) for name in ("llama.npz", "pangu_pi.npz")
)

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
}
"""Grouped queries, heads that do not add up to the width, and no value left at its default."""

MODULES = {**SMALL, "series_terms": 2, "shortcut_ratio": 4}


def run_transformers(
    config: dict[str, Any], seed: int, length: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Random weights by name, random ids [2, length], and their logits [2, length, vocabulary].

    The weights are ten times larger than a fresh model's, so that logits are of size one and
    attention is far from even.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pangu_tiny.convert.modeling_pangu_pi import PanguPiConfig, PanguPiForCausalLM

    kinds = (LlamaConfig, LlamaForCausalLM)
    if "series_terms" in config:
        kinds = (PanguPiConfig, PanguPiForCausalLM)
    torch.manual_seed(seed)
    model = kinds[1](kinds[0](**config, initializer_range=0.2)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "act_fn.scale" in name:
                parameter.uniform_(0.5, 1.5)
            if "act_fn.bias" in name:
                parameter.uniform_(-0.5, 0.5)
        ids = torch.randint(0, config["vocab_size"], (2, length))
        logits = model(ids).logits
    weights = {name: leaf.detach().numpy() for name, leaf in model.named_parameters()}
    return weights, ids.numpy().astype(np.int32), logits.numpy()


if __name__ == "__main__":
    for file, config in ((GOLDEN, SMALL), (MODULES_GOLDEN, MODULES)):
        weights, ids, logits = run_transformers(config, seed=0, length=24)
        told = np.array(json.dumps(config))
        np.savez_compressed(file, __config__=told, __ids__=ids, __logits__=logits, **weights)
        print(f"{file}: {file.stat().st_size} bytes, logits up to {np.abs(logits).max():.2f}")
