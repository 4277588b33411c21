"""The stage that imports a LLaMA-like model from Hugging Face's layout.

Both rotate the first half of a head against the second; how axes lie is in `llama.py`. One tensor
is in memory at a time. Nothing is unpickled.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from pangu_tiny.checkpoints.write import FLOATS, Part, write_parts
from pangu_tiny.convert.added_tokens import added_tokens
from pangu_tiny.convert.llama import (
    EMBEDDING,
    HEAD,
    HuggingFaceConfig,
    Tensors,
    read_config,
    tensors,
    to_ours,
)
from pangu_tiny.convert.weights import Weights
from pangu_tiny.errors import UserError, check_one_of
from pangu_tiny.git_lfs import check_no_pointer
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.workdir import claim

_TEXTS = 20  # of added tokens, that are printed
_TIKTOKEN = rb"[A-Za-z0-9+/]+=* \d+\n"  # its first line: a piece in base64, and its rank


def import_hf(
    source: str,
    workdir: str,
    tokenizer: str | None = None,
    dtype: str | None = None,
    whole_vocabulary: bool = False,
) -> str:
    """Imports a LLaMA-like model as a checkpoint, tensor by tensor.

    Args:
      source: a local folder with config.json and model.safetensors, or shards and their index.
      workdir: the folder to write, local or gs://. An interrupted import is begun again in it.
      tokenizer: the SentencePiece model; None takes tokenizer.model in `source`. Rows of the
        embedding above its ids are left out: padding, and tokens that were added later, whose texts
        are printed. The model's begin and end marks must not be among them.
      dtype: "float32", "bfloat16" or "float16", in which parameters are stored; None keeps that
        of the matrices, or takes float32 where they differ.
      whole_vocabulary: keeps all rows of the embedding and stores `tokenizer` (None takes
        tokenizer.json in `source`) unread: for models without a SentencePiece model (LLaMA-3), and
        those that need their added tokens. generate reads and writes text by a tokenizer.json; no
        stage can compress such a vocabulary or prepare text with it.
    """
    check_one_of("import_hf.dtype", dtype, (None, *FLOATS))
    if "://" in source:
        raise UserError(f"import_hf.source is {source}, expected a local folder: copy it first")
    folder = pathlib.Path(source)
    config = read_config(folder / "config.json")
    weights = Weights(folder)
    if config.shape.depth > len(weights.tensors):
        raise UserError(
            f"{folder / 'config.json'}: num_hidden_layers is {config.shape.depth:,}, but there are"
            f" only {len(weights.tensors):,} tensors"
        )
    expected = tensors(config.shape)
    _check(weights, expected, config.shape.tied)
    vocabulary = _read_vocabulary(folder, tokenizer, whole_vocabulary, config)
    dtype = dtype or _dtype(weights, expected)
    shape = dataclasses.replace(config.shape, vocab_size=vocabulary.size)
    _name_rows(config.shape.vocab_size, vocabulary)
    identity = {
        "source": weights.digest(folder / "config.json"),
        "tokenizer": hashlib.sha256(vocabulary.tokenizer_bytes).hexdigest(),
        "vocab_size": shape.vocab_size,
        "dtype": dtype,
    }
    written = write_parts(
        claim(workdir, "import-hf", identity) / "checkpoints",
        shape,
        dtype,
        _parts(weights, expected, shape),
        vocabulary.tokenizer_bytes,
        label="import-hf",
        identity=identity,
        begin_id=vocabulary.begin_id,
        end_id=vocabulary.end_id,
        sequence_length=config.sequence_length,
        **({"end_ids": config.end_ids} if whole_vocabulary and len(config.end_ids) > 1 else {}),
    )
    print(
        f"imported {source}: {shape.parameters:,} parameters in {dtype}, depth {shape.depth},"
        f" width {shape.width}, heads {shape.heads} (key-value {shape.kv_heads}) of"
        f" {shape.head_dim}, ffn {shape.ffn_width}, vocabulary {shape.vocab_size:,}"
        f"{', tied' if shape.tied else ''}, sequences up to {config.sequence_length:,}\n"
        f"checkpoint {written}; next: "
        + ("generate, or rank-teacher by l1 or l2" if whole_vocabulary else "rank-teacher")
    )
    return str(written)


class _Vocabulary(NamedTuple):
    """The rows of the embedding that are kept, the first `size`; and, by id, the texts of added
    tokens, which may be among the others."""

    tokenizer_bytes: bytes
    size: int
    begin_id: int | None
    end_id: int | None
    added: dict[int, str]


def _read_vocabulary(
    folder: pathlib.Path, tokenizer: str | None, whole: bool, config: HuggingFaceConfig
) -> _Vocabulary:
    rows = config.shape.vocab_size
    if whole:
        stored = _read_whole(epath.Path(tokenizer or folder / "tokenizer.json"))
        return _Vocabulary(stored, rows, config.begin_id, config.end_id, {})
    found = _open_tokenizer(folder, tokenizer)
    if found.vocab_size > rows:
        raise UserError(
            f"tokenizer {found.name} has {found.vocab_size:,} ids, but {EMBEDDING} in {folder} has"
            f" {rows:,} rows, expected as many rows or more"
        )
    added = added_tokens(folder) if found.vocab_size < rows else {}
    vocabulary = _Vocabulary(
        found.model_bytes, found.vocab_size, found.begin_id, found.end_id, added
    )
    _check_mark("bos_token_id", config.begin_ids, found.begin_id, vocabulary, folder)
    _check_mark("eos_token_id", config.end_ids, found.end_id, vocabulary, folder)
    return vocabulary


def _open_tokenizer(folder: pathlib.Path, given: str | None) -> Tokenizer:
    """The SentencePiece model; for a model that never had one, the error says what to do."""
    file, beside = epath.Path(given or folder / "tokenizer.model"), folder / "tokenizer.json"
    never_had = None
    if file.is_file():
        if re.match(_TIKTOKEN, file.read_bytes()):
            never_had = f"tokenizer {file} is of tiktoken"
    elif given is None and beside.exists():
        never_had = f"{beside} is there, but no {file.name}"
    if never_had is None:
        return Tokenizer.open(file)
    raise UserError(
        f"{never_had}, and compress-tokenizer, prepare-data and what follows need a SentencePiece"
        " model: give one as import_hf.tokenizer, or, for models that have none (LLaMA-3),"
        " import_hf.whole_vocabulary = True imports the weights with their vocabulary left whole"
    )


def _read_whole(file: epath.Path) -> bytes:
    if not file.is_file():
        raise UserError(f"tokenizer {file} does not exist, expected one to store")
    content = file.read_bytes()
    check_no_pointer(file, content)
    if not content:
        raise UserError(f"tokenizer {file} is empty, expected one to store")
    return content


def _check_mark(
    name: str, ids: list[int], own: int, vocabulary: _Vocabulary, folder: pathlib.Path
) -> None:
    """Refuses a mark whose row is left out: the model would never be told of it, or never end."""
    for token_id in ids:
        if token_id >= vocabulary.size:
            text = vocabulary.added.get(token_id)
            raise UserError(
                f"{folder / 'config.json'}: {name} is {token_id}{f' ({text})' if text else ''}, and"
                f" rows above the tokenizer's {vocabulary.size:,} ids are left out:"
                " import_hf.whole_vocabulary = True keeps all rows (and tokenizer.json), or set"
                f" {name} to {own}, the tokenizer's own"
            )


def _check(weights: Weights, expected: Tensors, tied: bool) -> None:
    """Whether the tensors are those of the config, by their headers."""
    weights.check(
        dict(expected.values()),
        ignored=("rotary_emb.inv_freq", *([HEAD] if tied else [])),
    )
    if tied and HEAD in weights.tensors:
        alike = weights.tensors[HEAD][1:] == weights.tensors[EMBEDDING][1:]
        if not alike or not np.array_equal(
            weights.read(EMBEDDING), weights.read(HEAD), equal_nan=True
        ):
            raise UserError(
                f"{weights.say(HEAD)} is not {EMBEDDING}, but tie_word_embeddings is true in"
                " config.json, expected a copy, or no such tensor"
            )


def _dtype(weights: Weights, expected: Tensors) -> str:
    """The type of the matrices; where they differ, the one that holds all of them."""
    stored = [(len(size), weights.tensors[name].dtype) for name, size in expected.values()]
    found = sorted({dtype for axes, dtype in stored if axes == 2})
    dtype = found[0] if len(found) == 1 else "float32"
    if any(other != dtype for _, other in stored):
        print(f"matrices are {' and '.join(found)}: all parameters are stored as {dtype}")
    return dtype


def _name_rows(rows: int, vocabulary: _Vocabulary) -> None:
    """Prints which rows of the embedding are left out."""
    left_out = np.arange(vocabulary.size, rows)
    named = np.isin(left_out, [i for i in vocabulary.added if 0 <= i < rows])
    if named.any():
        texts = [vocabulary.added[row] for row in left_out[named].tolist()]
        said = [text if text.isprintable() else repr(text) for text in texts[:_TEXTS]]
        more = f" and {len(texts) - _TEXTS:,} more" if len(texts) > _TEXTS else ""
        print(f"{EMBEDDING}: {_rows(left_out[named])} left out: {', '.join(said)}{more}")
    if not named.all():
        print(f"{EMBEDDING}: {_rows(left_out[~named])} left out, padding above the tokenizer's ids")


def _rows(ids: np.ndarray) -> str:
    """Some rows in words, at most four runs of them."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    said = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:4]]
    more = f", … ({len(ids):,} in all)" if len(runs) > 4 else ""
    return f"row{'s' if len(ids) > 1 else ''} {', '.join(said)}{more}"


def _parts(weights: Weights, expected: Tensors, shape: ModelShape) -> Iterator[Part]:
    """The parts of the checkpoint, all of them finite."""
    leaves = flatten_dict(parameter_shapes(shape), sep="/")
    padding = ((0, shape.padded_vocab - shape.vocab_size), (0, 0))
    for (name, layer), (theirs, _) in expected.items():
        value = weights.read(theirs)
        if theirs in (EMBEDDING, HEAD):
            value = np.pad(value[: shape.vocab_size], padding)
        if bad := value.size - int(np.count_nonzero(np.isfinite(value))):
            raise UserError(
                f"{weights.say(theirs)} holds {bad:,} NaN or infinite values, expected none"
            )
        size = leaves[name].shape
        yield Part(name, layer, to_ours(name, value, size if layer is None else size[1:]))
