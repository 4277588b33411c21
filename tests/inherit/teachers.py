"""Teachers for tests: random models of every kind, as checkpoints, and cuts of them."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from pangu_tiny.checkpoints.write import Part, parts_of, write_parts
from pangu_tiny.inherit.cut_list import CutList
from pangu_tiny.inherit.structures import apply_masks, masked_shape, select_layers
from pangu_tiny.model.decoder import Decoder, logits
from pangu_tiny.model.shape import ModelShape

PLAIN = ModelShape(
    depth=4, width=24, heads=6, kv_heads=3, head_dim=6, ffn_width=40, vocab_size=50, norm_eps=1e-3
)
"""Grouped queries, padded vocabulary, an ε that shows."""

KINDS = {
    "grouped": PLAIN,
    "tied": dataclasses.replace(PLAIN, tied=True),
    "all kv heads": dataclasses.replace(PLAIN, kv_heads=6),
    "pangu": dataclasses.replace(PLAIN, series_terms=2, shortcut_ratio=4),
    "pangu, tied, all kv heads": dataclasses.replace(
        PLAIN, kv_heads=6, tied=True, series_terms=2, shortcut_ratio=4
    ),
}

SMALLER = {"depth": 3, "width": 16, "heads": 4, "kv_heads": 2, "ffn_width": 24, "head_dim": 6}


def save(
    workdir: pathlib.Path,
    shape: ModelShape,
    params: dict[str, Any],
    dtype: str = "float32",
    tokenizer: tuple[str, bytes] = ("t", b"tokens"),
    sequence_length: int = 24,
) -> str:
    """Writes parameters as an imported checkpoint; `tokenizer` is its digest and bytes."""
    flat = flatten_dict(params, sep="/")
    parts = (
        Part(name, layer, np.asarray(flat[name] if layer is None else flat[name][layer]))
        for name, layer in parts_of(shape)
    )
    write_parts(
        epath.Path(workdir) / "checkpoints",
        shape,
        dtype,
        parts,
        tokenizer[1],
        label="teacher",
        identity={"tokenizer": tokenizer[0]},
        begin_id=1,
        end_id=2,
        sequence_length=sequence_length,
    )
    return str(workdir)


def random_scores(shape: ModelShape, layers: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores as `plan` takes them."""
    random = np.random.default_rng(seed)
    kinds = {"kv_heads": shape.kv_heads, "heads": shape.heads, "ffn": shape.ffn_width}
    kinds["bottleneck"] = shape.bottleneck
    inside = {kind: random.random((layers, size)) for kind, size in kinds.items()}
    return {"embed": random.random(shape.width), **inside}


def masked(params: dict[str, Any], shape: ModelShape, cuts: CutList) -> tuple[Any, Decoder]:
    """The teacher with all silenced that is not in a cut list, and the decoder that runs it."""
    depth = len(cuts.layers)
    masks = {"embed": np.zeros(shape.width), "heads": np.zeros((depth, shape.heads))}
    masks["ffn"] = np.zeros((depth, shape.ffn_width))
    masks["bottleneck"] = np.zeros((depth, shape.bottleneck))
    masks["embed"][cuts.embed] = 1
    for layer, block in enumerate(cuts.blocks):
        for kind in ("heads", "ffn", "bottleneck"):
            masks[kind][layer, block[kind]] = 1
    masks = jax.tree.map(lambda mask: jnp.asarray(mask, jnp.float32), masks)
    silenced = apply_masks(select_layers(params, cuts.layers), masks)
    shape = dataclasses.replace(shape, depth=depth)
    return silenced, Decoder(masked_shape(shape, len(cuts.embed)))


jit_logits = jax.jit(logits, static_argnums=0)
