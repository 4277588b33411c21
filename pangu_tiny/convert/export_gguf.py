"""The stage that writes a checkpoint of plain blocks as one GGUF file, for llama.cpp.

llama.cpp turns neighbours (2i, 2i + 1) of a head by the rotary angle i where this project turns
(i, i + head_dim / 2), so that the rows of queries and keys are put in its order. One tensor is in
memory at a time.
"""

import os
import pathlib
from typing import Any

import numpy as np

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.checkpoints.write import FLOATS, Part, cast
from pangu_tiny.convert.llama import tensors, to_theirs
from pangu_tiny.errors import UserError, check_one_of
from pangu_tiny.progress import Progress
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.workdir import claim, replaced

_NAMES = {
    "embedding/table": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    "blocks/attention_norm/scale": "blk.{}.attn_norm.weight",
    "blocks/attention/query": "blk.{}.attn_q.weight",
    "blocks/attention/key": "blk.{}.attn_k.weight",
    "blocks/attention/value": "blk.{}.attn_v.weight",
    "blocks/attention/out": "blk.{}.attn_output.weight",
    "blocks/ffn_norm/scale": "blk.{}.ffn_norm.weight",
    "blocks/ffn/gate": "blk.{}.ffn_gate.weight",
    "blocks/ffn/up": "blk.{}.ffn_up.weight",
    "blocks/ffn/down": "blk.{}.ffn_down.weight",
}
_TURNED = ("blocks/attention/query", "blocks/attention/key")
_KINDS = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"),
          "bfloat16": ("BF16", "MOSTLY_BF16")}  # fmt: skip


def export_gguf(checkpoint: str, workdir: str, dtype: str | None = None) -> str:
    """Writes `model.gguf`, tokenizer included, which llama.cpp and what is built on it read.

    Args:
      checkpoint: a train workdir, or that of inherit or import-hf, or a step in one; of plain
        blocks, since llama.cpp knows no modules of PanGu-π.
      workdir: the local folder to write.
      dtype: "float32", "bfloat16" or "float16" of matrices; None keeps that of the checkpoint.
        Norms are float32, as llama.cpp has them.
    """
    check_one_of("export_gguf.dtype", dtype, (None, *FLOATS))
    if "://" in workdir:
        raise UserError(f"export_gguf.workdir is {workdir}, expected a local folder: copy it then")
    try:
        import gguf
    except ImportError as error:
        raise UserError("export-gguf needs gguf: pip install 'pangu_tiny[hf]'") from error
    opened = open_checkpoint(checkpoint)
    shape, kind = opened.shape, str(np.dtype(dtype or opened.dtype))
    if shape.series_terms > 1 or shape.shortcut_ratio:
        raise UserError(
            f"checkpoint {opened.path} has modules of PanGu-π (series_terms {shape.series_terms},"
            f" shortcut_ratio {shape.shortcut_ratio}), which llama.cpp does not compute: for it,"
            " train with ModelShape.series_terms = 1 and shortcut_ratio = 0, or use export-hf"
        )
    tokenizer = opened.sentencepiece()
    _check(tokenizer)
    identity = {"checkpoint": opened.identity, "dtype": kind}
    file = claim(workdir, "export-gguf", identity) / "model.gguf"
    with replaced(file) as temporary:
        writer = gguf.GGUFWriter(pathlib.Path(temporary), "llama")
        _describe(writer, opened, gguf.LlamaFileType[_KINDS[kind][1]])
        _add_tokenizer(writer, tokenizer, opened)
        _write_tensors(writer, opened, kind, gguf.GGMLQuantizationType[_KINDS[kind][0]])
    print(
        f"exported {opened.path}: {shape.parameters:,} parameters in {kind}\n"
        f"  llama-cli --model {os.fspath(file)} --prompt 'def '"
    )
    return os.fspath(file)


def _check(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer to which llama.cpp's, which merges by score, is not equal."""
    model, kinds = tokenizer.proto, tokenizer.kinds
    rules = model.normalizer_spec
    defined = [model.pieces[i].piece for i in np.flatnonzero(kinds == proto.USER_DEFINED)]
    reasons = {
        "it is no BPE": model.trainer_spec.model_type != proto.BPE,
        "it has no pieces for bytes": not (kinds == proto.BYTE).any(),
        "it has unused pieces": (kinds == proto.UNUSED).any(),
        "it normalises text": rules.precompiled_charsmap,
        "it does not write a space as U+2581": not rules.escape_whitespaces,
        "it marks the ends of words": model.trainer_spec.treat_whitespace_as_suffix,
        "a space is put before a text, and there are user-defined pieces, after each of which"
        " llama.cpp would put another": rules.add_dummy_prefix and defined,
        "a user-defined piece holds a space, which llama.cpp looks for before it is written as"
        " U+2581": any({proto.SPACE, " "} & set(piece) for piece in defined),
        "user-defined pieces overlap, of which llama.cpp takes the longest first, wherever it"
        " stands": _overlap(defined),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(
            f"tokenizer {tokenizer.name} cannot be exported to llama.cpp exactly: {found[0]}"
        )
    if rules.remove_extra_whitespaces:
        print("the tokenizer removes spaces at the ends of a text and in runs; llama.cpp does not")


def _overlap(pieces: list[str]) -> bool:
    """Whether one may begin inside of another that is no longer, and go on after it."""
    begun_by: dict[str, set[str]] = {}
    for piece in pieces:
        for end in range(1, len(piece)):
            begun_by.setdefault(piece[:end], set()).add(piece)
    return any(
        len(other) >= len(piece)
        for piece in pieces
        for start in range(1, len(piece))
        for other in begun_by.get(piece[start:], set()) - {piece}
    )


def _describe(writer: Any, opened: Checkpoint, file_type: Any) -> None:
    shape = opened.shape
    writer.add_file_type(file_type)
    writer.add_context_length(opened.about["sequence_length"])
    writer.add_block_count(shape.depth)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, opened: Checkpoint) -> None:
    model = tokenizer.proto
    writer.add_tokenizer_model("llama")  # SentencePiece, merged by score
    writer.add_tokenizer_pre("default")
    # Rows that no piece goes with have to be named there too.
    padding = range(tokenizer.pieces, opened.shape.vocab_size)
    pieces = [piece.piece for piece in model.pieces] + [f"[PAD{i}]" for i in padding]
    writer.add_token_list([piece.encode() for piece in pieces])
    writer.add_token_scores([piece.score for piece in model.pieces] + [0.0] * len(padding))
    writer.add_token_types([*map(int, tokenizer.kinds), *[proto.UNUSED] * len(padding)])
    for add, mark in ((writer.add_bos_token_id, "begin_id"), (writer.add_eos_token_id, "end_id")):
        if opened.about[mark] is not None:
            add(opened.about[mark])
    writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_add_bos_token(opened.about["begin_id"] is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(bool(model.normalizer_spec.add_dummy_prefix))


def _write_tensors(writer: Any, opened: Checkpoint, kind: str, stored: Any) -> None:
    table, single = tensors(opened.shape), np.dtype("float32")
    for (name, layer), (_, size) in table.items():
        matrix = len(size) == 2
        held = np.dtype(kind) if matrix else single
        given = {"raw_dtype": stored} if matrix else {}  # gguf knows no bfloat16 of NumPy
        size_in_bytes = int(np.prod(size)) * held.itemsize
        writer.add_tensor_info(_NAMES[name].format(layer), size, held, size_in_bytes, **given)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    leaves = {name: opened.leaf(name) for name, _ in table}
    with Progress("export-gguf", len(table), "tensor") as progress:
        for (name, layer), (_, size) in table.items():
            value = to_theirs(name, leaves[name].read(layer), size)
            if name in _TURNED:
                value = _neighbours(value, opened.shape.head_dim)
            held = np.dtype(kind) if len(size) == 2 else single
            writer.write_tensor_data(np.ascontiguousarray(cast(Part(name, layer, value), held)))
            progress.update(1)
    writer.close()


def _neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows i and i + head_dim / 2 of every head side by side."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)
