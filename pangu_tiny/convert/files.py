"""JSON files of a model in Hugging Face layout."""

import json
import pathlib
from typing import Any

from pangu_tiny.errors import UserError
from pangu_tiny.git_lfs import check_no_pointer


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      UserError: it holds none, or cannot be read.
      FileNotFoundError: there is no such file.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    check_no_pointer(file, content)
    if not content.strip():
        raise UserError(f"{file} is empty, expected a JSON object")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, expected a JSON object")
    return found
