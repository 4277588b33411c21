"""The tokenizer's files of a model in Hugging Face layout, proved equal while they are made."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.tokenizer_json import TokenizerJson
from pangu_tiny.vocabulary import huggingface

_TEXTS = 2000  # that are drawn
_CHARACTERS = (
    " ",
    "   ",
    proto.SPACE,
    "\n",
    "\t",
    "0",
    "7",
    "é",
    "ß",
    "世",
    "界",
    "。",
    "🙂",
    "e\u0301",
)


def tokenizer_files(opened: Checkpoint) -> dict[str, str | bytes]:
    """By name. Raises UserError where the format cannot express the tokenizer."""
    if opened.has_whole_vocabulary:
        return _as_it_came(opened)
    tokenizer = opened.sentencepiece()
    files = huggingface.export(tokenizer)
    exported = TokenizerJson(files["tokenizer.json"].encode(), f"of checkpoint {opened.path}")
    for text in _texts(tokenizer):
        ours, theirs = tokenizer.encode(text), exported.encode(text)
        if ours != theirs:
            raise UserError(
                f"tokenizer {tokenizer.name} cannot be exported exactly: {text!r} is {ours[:20]},"
                f" in Hugging Face's format {theirs[:20]}"
            )
    return {**files, "tokenizer.model": tokenizer.model_bytes}


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Every piece as a text, and texts drawn from pieces and from what is hard; none spells a mark,
    which Hugging Face reads as one."""
    kinds = tokenizer.kinds
    pieces = [tokenizer.piece(i).replace(proto.SPACE, " ") for i in range(tokenizer.pieces)]
    marks = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == proto.CONTROL]
    usual = [pieces[i] for i in np.flatnonzero(np.isin(kinds, (proto.NORMAL, proto.USER_DEFINED)))]
    random = np.random.default_rng(0)

    def one_of(texts: Sequence[str]) -> str:
        return texts[int(random.integers(len(texts)))]

    drawn = (
        "".join(
            one_of(_CHARACTERS if random.random() < 0.3 else usual)
            for _ in range(random.integers(1, 12))
        )
        for _ in range(_TEXTS)
    )
    for text in (*usual, *drawn):
        if not any(mark in text for mark in marks):
            yield text


def _as_it_came(opened: Checkpoint) -> dict[str, str | bytes]:
    """A tokenizer.json that was left whole, and which of its tokens are the marks."""
    tokenizer = TokenizerJson(opened.tokenizer_bytes, f"of checkpoint {opened.path}")
    ids = {"bos_token": opened.about["begin_id"], "eos_token": opened.about["end_id"]}
    texts = {mark: tokenizer.piece(i) for mark, i in ids.items() if i is not None}
    config = {
        **huggingface.CONFIG,
        **{mark: text for mark, text in texts.items() if text is not None},
    }
    return {
        "tokenizer.json": opened.tokenizer_bytes,
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
