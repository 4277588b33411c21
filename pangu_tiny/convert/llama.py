"""What a Hugging Face config.json says of a LLaMA-like model, and what its tensors then are.

Axes: d width, f ffn, v vocabulary rows, q all query heads × head_dim, n all key-value heads ×
head_dim.
"""

import json
import pathlib
from typing import Any, NamedTuple

from pangu_tiny.checkpoints.write import parts_of
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""By model_type; both are the same tensors and the same computation."""

_PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": None,
}
"""Settings that change what a model computes → the one value that our decoder computes; a model
that has no such setting, or null, has that value too."""

_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
"""The same for `rope_parameters` and `rope_scaling`, beside their rope_theta."""

Tensors = dict[tuple[str, int | None], tuple[str, tuple[int, ...]]]
"""Name and layer of every part of a checkpoint → name and shape in Hugging Face's layout."""


class HuggingFaceConfig(NamedTuple):
    """A config.json.

    Attributes:
      shape: its sizes; vocab_size is the number of rows of the embedding, padding included.
      sequence_length: the longest sequence that it allows (max_position_embeddings).
      begin_id, end_id: its marks, the first where it has several; None where it has none.
    """

    shape: ModelShape
    sequence_length: int
    begin_id: int | None
    end_id: int | None


def read_config(file: pathlib.Path) -> HuggingFaceConfig:
    """Reads and checks a config.json.

    Raises:
      UserError: the file cannot be read, lacks a size, contradicts itself, or describes a model
        that computes something else than our decoder.
    """
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{file} does not exist; expected a model in Hugging Face layout"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    _check_architecture(config, file)
    positions = _number(config, "max_position_embeddings", file)
    _check_window(config, positions, file)
    heads = _number(config, "num_attention_heads", file)
    sizes = {
        "depth": _number(config, "num_hidden_layers", file),
        "width": _number(config, "hidden_size", file),
        "heads": heads,
        "kv_heads": _number(config, "num_key_value_heads", file, heads),
        "head_dim": _number(config, "head_dim", file, 0),
        "ffn_width": _number(config, "intermediate_size", file),
        "vocab_size": _number(config, "vocab_size", file),
        "tied": _flag(config, "tie_word_embeddings", file),
        "rope_theta": _rope_theta(config, file),
        "norm_eps": float(_number(config, "rms_norm_eps", file, kinds=(int, float))),
    }
    try:
        shape = ModelShape(**sizes)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    marks = (_mark(config.get(name)) for name in ("bos_token_id", "eos_token_id"))
    return HuggingFaceConfig(shape, positions, *marks)


def tensors(shape: ModelShape) -> Tensors:
    """The tensors of a model of this shape; matrices are [out, in]."""
    d, f, v = shape.width, shape.ffn_width, shape.vocab_size
    q, n = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    theirs = {
        "embedding/table": (EMBEDDING, (v, d)),
        "final_norm/scale": ("model.norm.weight", (d,)),
        "head/kernel": (HEAD, (v, d)),
        "blocks/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", (d,)),
        "blocks/attention/query": ("model.layers.{}.self_attn.q_proj.weight", (q, d)),
        "blocks/attention/key": ("model.layers.{}.self_attn.k_proj.weight", (n, d)),
        "blocks/attention/value": ("model.layers.{}.self_attn.v_proj.weight", (n, d)),
        "blocks/attention/out": ("model.layers.{}.self_attn.o_proj.weight", (d, q)),
        "blocks/ffn_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", (d,)),
        "blocks/ffn/gate": ("model.layers.{}.mlp.gate_proj.weight", (f, d)),
        "blocks/ffn/up": ("model.layers.{}.mlp.up_proj.weight", (f, d)),
        "blocks/ffn/down": ("model.layers.{}.mlp.down_proj.weight", (d, f)),
    }
    return {
        (name, layer): (theirs[name][0].format(layer), theirs[name][1])
        for name, layer in parts_of(shape)
    }


def _check_architecture(config: dict[str, Any], file: pathlib.Path) -> None:
    kind, names = config.get("model_type"), config.get("architectures")
    if kind not in _ARCHITECTURES or names not in (None, [_ARCHITECTURES[kind]]):
        wanted = " or ".join(f"{k} ({name})" for k, name in _ARCHITECTURES.items())
        raise UserError(f"{file}: model_type is {kind!r} ({names}), expected {wanted}")
    for name, plain in _PLAIN.items():
        if config.get(name) not in (None, plain):
            raise UserError(
                f"{file}: {name} is {config[name]!r}, which is not implemented; expected {plain!r}"
            )


def _check_window(config: dict[str, Any], positions: int, file: pathlib.Path) -> None:
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return
    window = _number(config, "sliding_window", file)
    if window < positions:
        raise UserError(
            f"{file}: sliding_window is {window}, which is not implemented; expected null or at"
            f" least max_position_embeddings, {positions} (shorter sequences are whole in it: with"
            f" max_position_embeddings at {window} the model is the same)"
        )


def _rope_theta(config: dict[str, Any], file: pathlib.Path) -> float:
    """The base of the rotary frequencies, at the top or in `rope_parameters` or `rope_scaling`."""
    bases = {}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    for place in ("rope_parameters", "rope_scaling"):
        found = config.get(place) or {}
        plain = isinstance(found, dict) and all(
            name == "rope_theta" or value == _PLAIN_ROPE.get(name) for name, value in found.items()
        )
        if not plain:
            raise UserError(
                f"{file}: {place} is {found}, which is not implemented; expected rope_theta and"
                " the rope_type 'default' over whole heads"
            )
        if "rope_theta" in found:
            bases[f"{place}.rope_theta"] = found["rope_theta"]
    for name in bases:
        _number(bases, name, file, kinds=(int, float))
    if len(set(bases.values())) > 1:
        said = " but ".join(f"{name} is {value}" for name, value in bases.items())
        raise UserError(f"{file}: {said}; expected one value")
    name, value = next(iter(bases.items()), ("rope_theta", 10_000.0))  # what LLaMA has without
    return float(_number({name: value}, name, file, kinds=(int, float)))


def _number(
    config: dict[str, Any],
    name: str,
    file: pathlib.Path,
    default: int | None = None,
    kinds: tuple[type, ...] = (int,),
) -> Any:
    """A positive number; `default` where it is absent or null and there is one."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if type(value) not in kinds or value <= 0:
        found = "missing" if value is None else repr(value)
        raise UserError(f"{file}: {name} is {found}, expected a positive {kinds[-1].__name__}")
    return value


def _flag(config: dict[str, Any], name: str, file: pathlib.Path) -> bool:
    """True or false; false where it is absent or null."""
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise UserError(f"{file}: {name} is {value!r}, expected true or false")
    return bool(value)


def _mark(value: int | list[int] | None) -> int | None:
    ids = value if isinstance(value, list) else [value]
    return ids[0] if ids else None
