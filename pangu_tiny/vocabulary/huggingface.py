"""A SentencePiece BPE model in the format of Hugging Face's `tokenizers`.

Their BPE has a list of merges, each of two pieces of the vocabulary, and takes the first that
applies. The last merge of every piece, in the order of the scores, does what SentencePiece does.
What differs: SentencePiece reads "<s>" in a text as plain text, Hugging Face as
the mark, unless it is told `encode_special_tokens=True`.
"""

import graphlib
import json
from typing import Any

import numpy as np

from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary.pieces import Vocabulary

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
"""What every tokenizer_config.json says."""

_MANY = 2**20  # spaces that a text may begin with


def export(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of the same tokenizer in Hugging Face's format, by name.

    A text is given its begin mark, as in training, unless `add_special_tokens=False` is asked.
    """
    vocabulary = Vocabulary.of(tokenizer)
    _check(tokenizer, vocabulary)
    added = [
        {
            "id": int(i),
            "content": vocabulary.pieces[i],
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": bool(vocabulary.kinds[i] != proto.USER_DEFINED),
        }
        for i in np.flatnonzero(
            np.isin(vocabulary.kinds, (proto.UNKNOWN, proto.CONTROL, proto.USER_DEFINED))
        )
    ]
    begin = vocabulary.pieces[tokenizer.begin_id]
    opening = {"SpecialToken": {"id": begin, "type_id": 0}}
    text, second_text = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    marks = {
        "unk_token": vocabulary.pieces[tokenizer.unknown_id],
        "bos_token": begin,
        "eos_token": vocabulary.pieces[tokenizer.end_id],
    }
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(tokenizer),
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [opening, text],
            "pair": [opening, text, second_text],
            "special_tokens": {
                begin: {"id": begin, "ids": [tokenizer.begin_id], "tokens": [begin]}
            },
        },
        "decoder": _decoder(tokenizer),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": marks["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": vocabulary.byte_fallback,
            "ignore_merges": False,
            # A NUL becomes a byte in SentencePiece, though there may be a piece for it.
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces) if piece != "\0"},
            "merges": _merges(vocabulary),
        },
    }
    config = {**CONFIG, **marks}
    return {
        "tokenizer.json": json.dumps(description, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1),
        "special_tokens_map.json": json.dumps(marks, ensure_ascii=False, indent=1),
    }


def _check(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    model = tokenizer.proto
    rules = model.normalizer_spec
    defined = [vocabulary.pieces[i] for i in np.flatnonzero(vocabulary.kinds == proto.USER_DEFINED)]
    pairless = vocabulary.merging & ~vocabulary.unreachable & ~vocabulary.single
    reasons = {
        "it has unused pieces, which the format does not know": (
            vocabulary.kinds == proto.UNUSED
        ).any(),
        f"it normalises text ({rules.name or 'by rules of its own'})": rules.precompiled_charsmap,
        "it does not write a space as U+2581": not rules.escape_whitespaces,
        "it marks the ends of words": model.trainer_spec.treat_whitespace_as_suffix,
        "a space is put before a text, and there are user-defined pieces, after each of which the"
        " format would put another": rules.add_dummy_prefix and defined,
        "spaces are removed, and there are user-defined pieces, beside each of which the format"
        " would remove them too": rules.remove_extra_whitespaces and defined,
        "a user-defined piece holds a space, which the format looks for before it is written as"
        " U+2581": any({proto.SPACE, " "} & set(piece) for piece in defined),
        "it merges characters that are no pieces": (vocabulary.parts[pairless] < 0).any(),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"tokenizer {tokenizer.name} cannot be exported exactly: {found[0]}")


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The last merge of every piece, in the order in which they apply.

    No other pair can come to a piece: if its characters are two symbols, all that merged before
    merged inside of it, as it does when the piece stands alone. Where scores are equal,
    SentencePiece goes from left to right, Hugging Face by the order here: so a piece comes before
    those that begin with what it ends with.
    """
    parts = vocabulary.parts
    by_score: dict[float, list[int]] = {}
    for i in np.flatnonzero((parts >= 0).all(axis=1)).tolist():
        by_score.setdefault(float(vocabulary.scores[i]), []).append(i)
    ordered: list[int] = []
    for _, equals in sorted(by_score.items(), reverse=True):
        endings: dict[int, set[int]] = {}
        for i in equals:
            endings.setdefault(int(parts[i][1]), set()).add(i)
        before = {i: endings.get(int(parts[i][0]), set()) - {i} for i in equals}
        try:
            ordered += graphlib.TopologicalSorter(before).static_order()
        except graphlib.CycleError as error:
            names = " ".join(repr(vocabulary.pieces[i]) for i in error.args[1])
            raise UserError(
                f"the tokenizer cannot be exported exactly: the pieces {names} overlap in a circle"
                " and have equal scores"
            ) from error
    return [(vocabulary.pieces[parts[i][0]], vocabulary.pieces[parts[i][1]]) for i in ordered]


def _normalizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Spaces, and no other white space, are removed where SentencePiece does it: all that a text
    begins with, all but one of a run, and all that it ends with, be they written as U+2581."""
    rules = tokenizer.proto.normalizer_spec
    steps: list[dict[str, Any]] = []
    if rules.remove_extra_whitespaces:
        for pattern, content in ((r"\A +", ""), (" {2,}", " "), (rf"[ {proto.SPACE}]+\z", "")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": proto.SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": proto.SPACE})
    return {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else steps[0]


def _decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": proto.SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    rules = tokenizer.proto.normalizer_spec
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        removed = _MANY if rules.remove_extra_whitespaces else 1
        decoders.append({"type": "Strip", "content": " ", "start": removed, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}
