"""Tokens that were added to a model after its SentencePiece model, as its JSON files list them."""

import pathlib
from collections.abc import Iterator
from typing import Any

from pangu_tiny.convert.files import read_object
from pangu_tiny.errors import failing_as


def added_tokens(folder: pathlib.Path) -> dict[int, str]:
    """The texts of added tokens by their ids, out of all files that are there."""
    readers = {
        "added_tokens.json": _from_texts,
        "tokenizer_config.json": _from_decoder,
        "tokenizer.json": _from_list,
    }
    found: dict[int, str] = {}
    for name, listed in readers.items():
        if not (file := folder / name).exists():
            continue
        content = read_object(file)
        with failing_as(f"{file}: its added tokens cannot be read, expected ids and texts"):
            found |= {int(token_id): str(text) for token_id, text in listed(content)}
    return found


def _from_texts(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((token_id, text) for text, token_id in content.items())


def _from_decoder(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    decoder = content.get("added_tokens_decoder") or {}
    return ((token_id, token["content"]) for token_id, token in decoder.items())


def _from_list(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((token["id"], token["content"]) for token in content.get("added_tokens") or [])
