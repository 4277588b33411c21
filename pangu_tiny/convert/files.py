"""JSON files of a model in Hugging Face layout."""

import json
import pathlib
from typing import Any

from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.git_lfs import check_no_pointer


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds."""
    with failing_as(f"{file} cannot be read", OSError, ValueError, RecursionError):
        content = file.read_bytes()
        check_no_pointer(file, content)
        if not content.strip():
            raise UserError(f"{file} is empty, expected a JSON object")
        found = json.loads(content)
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, expected a JSON object")
    return found
