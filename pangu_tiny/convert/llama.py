"""What a Hugging Face config.json says of a LLaMA-like model, and what its tensors then are: one
table for the way in and the way out.

Axes: d width, f ffn, v vocabulary rows, q all query heads × head_dim, n all key-value heads ×
head_dim, r bottleneck, s series terms.
"""

import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from pangu_tiny.checkpoints.write import parts_of
from pangu_tiny.convert.files import read_object
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

PANGU_PI = "pangu_pi"
"""The model_type of models with the modules of PanGu-π, which are LLaMA's with more tensors."""

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    PANGU_PI: "PanguPiForCausalLM",
}
"""By model_type; the first two are the same tensors and the same computation."""

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

_ROPE_SETTINGS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
}  # fmt: skip
"""What `rope_parameters` and `rope_scaling` may hold. The types that are taken (see `_context`)
read none of them but their factor; all others are for types that are refused."""

Tensors = dict[tuple[str, int | None], tuple[str, tuple[int, ...]]]
"""Name and layer of every part of a checkpoint → name and shape in Hugging Face's layout."""


Marks = dict[str, int | list[int] | None]
"""`bos_token_id` and `eos_token_id`: the begin mark and the end mark, or several end marks."""


class HuggingFaceConfig(NamedTuple):
    """A config.json.

    Attributes:
      shape: its sizes; vocab_size is the number of rows of the embedding, padding included.
      sequence_length: the longest sequence that it allows (max_position_embeddings), and within
        which it leaves the rotary frequencies as they are.
      begin_ids, end_ids: all ids that are begin or end marks; there may be none.
    """

    shape: ModelShape
    sequence_length: int
    begin_ids: list[int]
    end_ids: list[int]

    @property
    def begin_id(self) -> int | None:
        """The begin mark, the first where there are several."""
        return self.begin_ids[0] if self.begin_ids else None

    @property
    def end_id(self) -> int | None:
        """The end mark, the first where there are several."""
        return self.end_ids[0] if self.end_ids else None


def read_config(file: pathlib.Path) -> HuggingFaceConfig:
    """Reads and checks a config.json."""
    if not file.exists():
        raise UserError(f"{file} does not exist, expected a model in Hugging Face layout")
    config = read_object(file)
    _check_architecture(config, file)
    positions = _number(config, "max_position_embeddings", file)
    _check_window(config, positions, file)
    rope_theta, context = _rotary(config, positions, file)
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
        "rope_theta": rope_theta,
        "norm_eps": float(_number(config, "rms_norm_eps", file, kinds=(int, float))),
    }
    if config["model_type"] == PANGU_PI:
        sizes["series_terms"] = _number(config, "series_terms", file)
        if config.get("shortcut_ratio") != 0:
            sizes["shortcut_ratio"] = _number(config, "shortcut_ratio", file, 0)
    try:
        shape = ModelShape(**sizes)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    marks = (_marks(config, name, shape, file) for name in ("bos_token_id", "eos_token_id"))
    return HuggingFaceConfig(shape, context, *marks)


def needs_code(shape: ModelShape) -> bool:
    """Whether a model is more than `transformers` knows by itself: one with modules of PanGu-π, or
    whose width its heads do not divide, which LlamaConfig refuses."""
    return shape.series_terms > 1 or shape.shortcut_ratio > 0 or shape.width % shape.heads > 0


def config_of(shape: ModelShape, sequence_length: int, dtype: str, marks: Marks) -> dict[str, Any]:
    """The config.json of a model, which `read_config` reads back."""
    kind = PANGU_PI if needs_code(shape) else "llama"
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        **marks,
        "dtype": dtype,
    }
    if kind == PANGU_PI:
        config |= {"series_terms": shape.series_terms, "shortcut_ratio": shape.shortcut_ratio}
    return config


def tensors(shape: ModelShape) -> Tensors:
    """The tensors of a model of this shape; matrices are [out, in]."""
    d, f, v = shape.width, shape.ffn_width, shape.vocab_size
    q, n = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    r, series = shape.bottleneck, (shape.series_terms, f)
    theirs: dict[str, tuple[str, tuple[int, ...]]] = {
        "embedding/table": (EMBEDDING, (v, d)),
        "final_norm/scale": ("model.norm.weight", (d,)),
        "head/kernel": (HEAD, (v, d)),
        "blocks/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", (d,)),
        "blocks/attention/query": ("model.layers.{}.self_attn.q_proj.weight", (q, d)),
        "blocks/attention/key": ("model.layers.{}.self_attn.k_proj.weight", (n, d)),
        "blocks/attention/value": ("model.layers.{}.self_attn.v_proj.weight", (n, d)),
        "blocks/attention/out": ("model.layers.{}.self_attn.o_proj.weight", (d, q)),
        "blocks/shortcut/down": ("model.layers.{}.self_attn.shortcut.down.weight", (r, d)),
        "blocks/shortcut/up": ("model.layers.{}.self_attn.shortcut.up.weight", (d, r)),
        "blocks/ffn_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", (d,)),
        "blocks/ffn/gate": ("model.layers.{}.mlp.gate_proj.weight", (f, d)),
        "blocks/ffn/up": ("model.layers.{}.mlp.up_proj.weight", (f, d)),
        "blocks/ffn/down": ("model.layers.{}.mlp.down_proj.weight", (d, f)),
        "blocks/ffn/series_scale": ("model.layers.{}.mlp.act_fn.scale", series),
        "blocks/ffn/series_bias": ("model.layers.{}.mlp.act_fn.bias", series),
    }
    return {
        (name, layer): (theirs[name][0].format(layer), theirs[name][1])
        for name, layer in parts_of(shape)
    }


_ALIKE = ("embedding/table", "blocks/ffn/series_scale", "blocks/ffn/series_bias")
"""Parts with the same axes in both; of all others a matrix is [out, in] there and [in, out] here,
where heads are an axis of their own."""


def to_theirs(name: str, value: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A part of a checkpoint as the tensor of that size, without rows of padding."""
    if name == "embedding/table":
        value = value[: size[0]]
    if name == "head/kernel":
        value = value[:, : size[0]]
    turned = name not in _ALIKE and len(size) == 2
    return value.reshape(size[::-1]).T if turned else value


def to_ours(name: str, tensor: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The same the other way, of a size of ours."""
    return (tensor if name in _ALIKE else tensor.T).reshape(size)


def _check_architecture(config: dict[str, Any], file: pathlib.Path) -> None:
    kind, names = config.get("model_type"), config.get("architectures")
    expected = _ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if expected is None or names not in (None, [expected]):
        wanted = " or ".join(f"{k} ({name})" for k, name in _ARCHITECTURES.items())
        raise UserError(f"{file}: model_type is {kind!r} ({names}), expected {wanted}")
    for name, plain in _PLAIN.items():
        if config.get(name) not in (None, plain):
            raise UserError(
                f"{file}: {name} is {config[name]!r}, which is not implemented, expected {plain!r}"
            )


def _check_window(config: dict[str, Any], positions: int, file: pathlib.Path) -> None:
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return
    window = _number(config, "sliding_window", file)
    if window < positions:
        raise UserError(
            f"{file}: sliding_window is {window}, which is not implemented, expected null or at"
            f" least max_position_embeddings, {positions} (shorter sequences are whole in it: with"
            f" max_position_embeddings at {window} the model is the same)"
        )


def _rotary(config: dict[str, Any], positions: int, file: pathlib.Path) -> tuple[float, int]:
    """The base of the rotary frequencies, at the top or in `rope_parameters` or `rope_scaling`, and
    the longest sequence within which these change nothing else."""
    bases, context = {}, positions
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    for place in ("rope_parameters", "rope_scaling"):
        rope = config.get(place) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{file}: {place} is {rope!r}, expected a JSON object")
        rope = {name: value for name, value in rope.items() if value is not None}
        context = min(context, _context(rope, positions, f"{file}: {place}"))
        if "rope_theta" in rope:
            bases[f"{place}.rope_theta"] = rope["rope_theta"]
    for name in bases:
        _number(bases, name, file, kinds=(int, float))
    if len(set(bases.values())) > 1:
        said = " but ".join(f"{name} is {value}" for name, value in bases.items())
        raise UserError(f"{file}: {said}, expected one value")
    name, value = next(iter(bases.items()), ("rope_theta", 10_000.0))  # what LLaMA has without
    return float(_number({name: value}, name, file, kinds=(int, float))), context


def _context(rope: dict[str, Any], positions: int, where: str) -> int:
    """The longest sequence whose rotary frequencies are those of the base alone, as far as these
    settings go; `positions` where they set no bound.

    As transformers 5 computes it for LLaMA: "default" reads the base and nothing else; "linear"
    divides all frequencies by its factor; "dynamic" changes the base only for sequences beyond
    max_position_embeddings. It does not read original_max_position_embeddings for that, others do:
    the shorter of both is what all agree on. The other types change frequencies at every length.
    """
    if unknown := sorted(rope.keys() - _ROPE_SETTINGS):
        raise UserError(f"{where} has {unknown[0]}, which is not implemented")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(
            f"{where}.partial_rotary_factor is {share!r}, which is not implemented, expected 1.0"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise UserError(f"{where}.rope_type is {kind!r} but type is {rope['type']!r}")
    if kind == "default":
        return positions
    if kind == "linear":
        factor = rope.get("factor")
        if type(factor) in (int, float) and factor == 1:
            return positions
        raise UserError(
            f"{where} is 'linear' with factor {factor!r}, which divides every position and is not"
            " implemented, expected factor 1.0, which changes nothing"
        )
    if kind == "dynamic":
        _number(rope, "factor", where, default=1, kinds=(int, float))
        original = "original_max_position_embeddings"
        return _number(rope, original, where, default=positions)
    raise UserError(
        f"{where} is {kind!r}, which changes the frequencies of short sequences too and is not"
        " implemented, expected 'default', 'linear' with factor 1.0, or 'dynamic'"
    )


def _number(
    config: dict[str, Any],
    name: str,
    file: pathlib.Path | str,
    default: int | None = None,
    kinds: tuple[type, ...] = (int,),
) -> Any:
    """A positive number, not beyond what such numbers can be; `default` where it is absent or null
    and there is one."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    integers = float not in kinds  # padded, they are still int32
    largest = 2**30 if integers else sys.float_info.max
    wanted = f"int up to {2**30:,}" if integers else "float"
    if type(value) not in kinds or not 0 < value <= largest:
        found = "missing" if value is None else repr(value)
        raise UserError(f"{file}: {name} is {found}, expected a positive {wanted}")
    return value


def _flag(config: dict[str, Any], name: str, file: pathlib.Path) -> bool:
    """True or false; false where it is absent or null."""
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise UserError(f"{file}: {name} is {value!r}, expected true or false")
    return bool(value)


def _marks(config: dict[str, Any], name: str, shape: ModelShape, file: pathlib.Path) -> list[int]:
    value = config.get(name)
    ids = value if isinstance(value, list) else [value]
    ids = [token_id for token_id in ids if token_id is not None]
    if not all(type(token_id) is int and 0 <= token_id < shape.vocab_size for token_id in ids):
        raise UserError(
            f"{file}: {name} is {value!r}, expected an id or a list of ids below vocab_size,"
            f" {shape.vocab_size}, or null"
        )
    return ids
