"""The tensors of a folder of safetensors files, listed by their headers and read one by one."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pangu_tiny.convert.files import read_object
from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.git_lfs import check_no_pointer
from pangu_tiny.progress import Progress

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BLOCK = 2**20  # bytes


class Tensor(NamedTuple):
    """What a header says of a tensor; `dtype` as numpy names it where weights may have it."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


class Weights:
    """The tensors of a model in Hugging Face layout.

    Attributes:
      files: model.safetensors, or the shards that its index names, in the order of their names.
      tensors: by name.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.files = _find_files(folder)
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            _check_content(file)
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    if name in self.tensors:
                        raise UserError(f"{name} is in {self.tensors[name].file} and in {file}")
                    part = opened.get_slice(name)
                    kind = part.get_dtype()
                    self.tensors[name] = Tensor(
                        file, tuple(part.get_shape()), _DTYPES.get(kind, kind)
                    )

    def read(self, name: str) -> np.ndarray:
        """The tensor, as it is stored."""
        file = self.tensors[name].file
        with _open(file) as opened:  # anew, so that what was read of a file does not stay mapped
            return opened.get_tensor(name)

    def say(self, name: str) -> str:
        """File, name, type and shape, for messages."""
        file, shape, dtype = self.tensors[name]
        return f"{file}: {name} {dtype}{list(shape)}"

    def digest(self, *others: pathlib.Path) -> str:
        """sha256 over the bytes of other files and then all of these, in hexadecimal."""
        files = [*others, *self.files]
        found = hashlib.sha256()
        with Progress("digest", sum(file.stat().st_size for file in files), "B") as progress:
            for file in files:
                with file.open("rb") as stream:
                    while block := stream.read(_BLOCK):
                        found.update(block)
                        progress.update(len(block))
        return found.hexdigest()

    def check(self, expected: dict[str, tuple[int, ...]], ignored: Sequence[str]) -> None:
        """Whether they are floats of just these names and shapes; others may be there whose names
        end in what is `ignored`."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            name = missing[0]
            raise UserError(
                f"{self.folder} has no tensor {name}{_more(missing)}, expected"
                f" {list(expected[name])} by its config.json"
            )
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                raise UserError(f"{self.say(name)}, expected {list(shape)} by its config.json")
            if self.tensors[name].dtype not in _DTYPES.values():
                raise UserError(f"{self.say(name)}, expected one of {', '.join(_DTYPES.values())}")
        extra = [
            name
            for name in sorted(self.tensors.keys() - expected.keys())
            if not name.endswith(tuple(ignored))
        ]
        if extra:
            raise UserError(
                f"{self.say(extra[0])}{_more(extra)} is left over: a model of this config.json has"
                " no such tensor"
            )


def _find_files(folder: pathlib.Path) -> list[pathlib.Path]:
    whole, index = folder / _WHOLE, folder / _INDEX
    if whole.exists() and index.exists():
        raise UserError(f"{folder} holds {_WHOLE} and {_INDEX}, expected one of them")
    if whole.exists():
        return [whole]
    if not index.exists():
        pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLED]
        if pickled:
            raise UserError(
                f"{folder} holds only {pickled[0]}{_more(pickled)}, and reading a pickle runs what"
                " is in it: refused, save the model as safetensors first"
            )
        raise UserError(f"{folder} holds neither {_WHOLE} nor {_INDEX}, expected one of them")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index}: weight_map is {places!r}, expected names of tensors and files")
    for tensor, name in places.items():
        if not isinstance(name, str) or name != pathlib.PurePath(name).name:
            raise UserError(
                f"{index}: {tensor} is in {name!r}, expected the name of a file beside the index"
            )
    names = sorted(set(places.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{index} names {absent[0]}{_more(absent)}, which is not there")
    return [folder / name for name in names]


def _check_content(file: pathlib.Path) -> None:
    with failing_as(f"{file} cannot be read", OSError), file.open("rb") as stream:
        head = stream.read(100)
    check_no_pointer(file, head)
    if not head:
        raise UserError(f"{file} is empty, expected tensors as safetensors stores them")


def _open(file: pathlib.Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise UserError("import-hf needs safetensors: pip install 'pangu_tiny[hf]'") from error
    with failing_as(f"{file} cannot be read", safetensors.SafetensorError, OSError):
        return safetensors.safe_open(file, framework="np")


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
