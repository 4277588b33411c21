"""Arrays on disk: one in an npy file, or named ones and their JSON metadata in an npz file."""

import json
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.workdir import replaced

_ABOUT = "about"

_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a file may raise that is no npy or npz file, or not a whole one."""


def write_arrays(
    path: epath.Path,
    arrays: dict[str, np.ndarray],
    about: dict[str, Any] | None = None,
    compress: bool = False,
) -> None:
    """An npz file that is there whole or not at all; `about`, JSON values, as one more array."""
    if about is not None:
        arrays = {**arrays, _ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}
    with replaced(path) as temporary, temporary.open("wb") as file:
        save: Any = np.savez_compressed if compress else np.savez
        save(file, **arrays)


def write_array(path: epath.Path, array: np.ndarray) -> None:
    """An npy file that is there whole or not at all."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def read_array(path: epath.Path) -> np.ndarray:
    """Reads an npy file."""
    with failing_as(f"{path} cannot be read", *_DAMAGED), path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote."""
    refused, advice = f"{path} cannot be read", "; remove it to make it again"
    with failing_as(refused, *_DAMAGED, advice=advice), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("it is no npz file, or not all of one")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)


def read_described(path: epath.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`about`, and the arrays."""
    arrays = read_arrays(path)
    try:
        return json.loads(arrays.pop(_ABOUT).tobytes()), arrays
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no metadata") from error
