"""Prompts from a file or from standard input."""

import json
import pathlib
import sys
from typing import Any

from pangu_tiny.errors import UserError, failing_as

_KEY = "prompt"


def read_prompts(source: str) -> list[str]:
    """One a line, in order; lines without anything are left out.

    Args:
      source: a file; one that ends in .jsonl holds JSON on each line, a string or an object with
        "prompt". "-" is standard input, of lines of either kind: JSON if the first begins as it.
    """
    name = "standard input" if source == "-" else source
    with failing_as(f"generate.prompts: {name} cannot be read as text", OSError, UnicodeError):
        if source == "-":
            content = sys.stdin.buffer.read().decode()
        else:
            content = pathlib.Path(source).read_text(encoding="utf-8")
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"generate.prompts: {name} holds no prompt, expected one a line")
    is_json = source.endswith(".jsonl") or (source == "-" and lines[0][1].lstrip()[0] in '{"')
    if not is_json:
        return [line.removesuffix("\r") for _, line in lines]
    return [_of_json(line, f"{name}, line {number}") for number, line in lines]


def _of_json(line: str, where: str) -> str:
    with failing_as(f"generate.prompts: {where} is not JSON", ValueError, RecursionError):
        found: Any = json.loads(line)
    prompt = found.get(_KEY) if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise UserError(
            f'generate.prompts: {where} has no "{_KEY}" of text, expected a string or an object'
            f' with "{_KEY}"'
        )
    return prompt
