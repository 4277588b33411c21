"""A small model in Hugging Face layout, with more rows than the tokenizer has ids."""

import numpy as np

from pangu_tiny.convert.llama import tensors
from pangu_tiny.model.shape import ModelShape

ROWS = 310  # of the embedding; the tokenizer has 300 ids
SHAPE = ModelShape(
    depth=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn_width=40,
    vocab_size=ROWS,
    rope_theta=500.0,
    norm_eps=1e-3,
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 7,
    "eos_token_id": [8, 9],
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": ROWS,
}
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def draw(shape=SHAPE, dtype="float32"):
    """Random weights by their Hugging Face names."""
    random = np.random.default_rng(0)
    sizes = dict(tensors(shape).values())
    return {name: random.normal(size=size).astype(dtype) for name, size in sizes.items()}
