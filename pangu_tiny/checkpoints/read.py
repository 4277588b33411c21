"""Checkpoints, read strictly, each one describing itself.

A step's folder holds `params` (arrays; stacked leaves in chunks of one layer), `tokenizer` (its
file as bytes), `about` (JSON: ModelShape, digests, marks, package versions) and, where training
wrote it, `optimizer`, all with checksums (`checksums.py`). A folder counts as a checkpoint if all
of it can be read.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from pangu_tiny.checkpoints import checksums
from pangu_tiny.checkpoints.checksums import MARK
from pangu_tiny.checkpoints.quiet import ignore_leftovers
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError, failing_as, reason
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.tokenizer_json import TokenizerJson
from pangu_tiny.topology.processes import from_first
from pangu_tiny.workdir import absolute, digest_of, environment


class Checkpoint(NamedTuple):
    """What every stage reads from a checkpoint, besides its arrays."""

    path: epath.Path
    shape: ModelShape
    about: dict[str, Any]
    tokenizer_bytes: bytes

    @property
    def dtype(self) -> np.dtype:
        """Of every parameter as it is stored."""
        return np.dtype(self.about.get("params_dtype", "float32"))

    @property
    def identity(self) -> dict[str, Any]:
        """What its contents follow from, and at which step."""
        return {"identity": self.about["identity"], "step": self.about["step"]}

    @property
    def digest(self) -> str:
        """sha256 of `identity`: the same for the same contents, wherever they lie."""
        facts = {"model": self.about["model"], "dtype": str(self.dtype), **self.identity}
        return digest_of(facts)

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer's state lies beside the parameters, as training leaves it."""
        return (self.path / "optimizer").exists()

    @property
    def has_whole_vocabulary(self) -> bool:
        """Whether its tokenizer is a tokenizer.json, which import-hf stores where it leaves a
        vocabulary whole; no SentencePiece model begins with a brace."""
        return self.tokenizer_bytes.lstrip().startswith(b"{")

    def tokenizer(self) -> Tokenizer | TokenizerJson:
        """What makes ids of text and text of ids."""
        kind = TokenizerJson if self.has_whole_vocabulary else Tokenizer
        return kind(self.tokenizer_bytes, f"of checkpoint {self.path}")

    def sentencepiece(self) -> Tokenizer:
        """The tokenizer, for what can be done with a SentencePiece model alone."""
        if self.has_whole_vocabulary:
            raise UserError(
                f"checkpoint {self.path} was imported with its vocabulary whole"
                " (import_hf.whole_vocabulary): its tokenizer is a tokenizer.json, expected a"
                " SentencePiece model"
            )
        return Tokenizer(self.tokenizer_bytes, f"of checkpoint {self.path}")

    def check_rows(self, rows: TokenDataset) -> None:
        """Refuses rows of another tokenizer, or of another length than it was trained on; an
        untrained (imported or cut) checkpoint accepts shorter rows."""
        tokenizer, allowed = self.about["identity"]["tokenizer"], self.about["sequence_length"]
        if rows.tokenizer_digest != tokenizer:
            if self.has_whole_vocabulary:
                self.sentencepiece()  # which it lacks: no text can be prepared in its ids
            raise UserError(
                f"dataset {rows.path} was made with tokenizer {rows.tokenizer_digest[:12]}, "
                f"checkpoint {self.path} reads {tokenizer[:12]}: prepare the text in its own ids"
            )
        shorter = self.about["step"] == 0 and rows.sequence_length < allowed
        if rows.sequence_length != allowed and not shorter:
            raise UserError(
                f"dataset {rows.path} has rows of {rows.sequence_length} targets, checkpoint "
                f"{self.path} takes {allowed}"
            )

    def params(self, shardings: Any = None, dtype: Any = np.float32) -> dict[str, Any]:
        """The parameters, laid out by `shardings` (a tree) if given, in the dtypes of
        `parameter_shapes`."""
        target = _with_shardings(parameter_shapes(self.shape, dtype), shardings)
        stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), target)
        try:
            return restore(self.path, params=(stored, target))["params"]
        except UserError:
            raise
        except Exception as error:
            raise unreadable(self.path, error) from error

    def leaf(self, name: str) -> "Leaf":
        """One parameter by its name in `model/decoder.py`, to be read in parts."""
        return Leaf(self.path / "params", name)


class Leaf:
    """A parameter on disk, with its name, shape and dtype. Of a stacked one a layer can be read at
    a time."""

    def __init__(self, folder: epath.Path, name: str, write: bool = False):
        self._where, self.name = f"checkpoint {folder}: {name}", name
        base = str(folder) if "://" in str(folder) else f"file://{folder}"
        kvstore: Any = f"{base}/{name.replace('/', '.')}/"
        with failing_as(f"{self._where} cannot be opened"):
            layout = json.loads((folder / "_METADATA").read_text())
            if layout["use_ocdbt"]:
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{name.replace('/', '.')}/"}
            spec = {
                "driver": "zarr3" if layout["use_zarr3"] else "zarr",
                "kvstore": kvstore,
                # A chunk that is missing is damage; so one of zeros has to be there too.
                "fill_missing_data_reads": False,
                "store_data_equal_to_fill_value": True,
            }
            self._array = tensorstore.open(spec, open=True, read=True, write=write).result()
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype: np.dtype = self._array.dtype.numpy_dtype

    def read(self, layer: int | None = None) -> np.ndarray:
        """The whole parameter, or one layer of a stacked one."""
        with failing_as(f"{self._where} cannot be read"):
            part = self._array if layer is None else self._array[layer]
            return part.read().result()

    def write(self, value: np.ndarray, layer: int | None = None) -> None:
        """Puts a value of the same shape and dtype in its place."""
        part = self._array if layer is None else self._array[layer]
        if (value.shape, value.dtype) != (part.shape, self.dtype):
            raise ValueError(f"{self.name}: {value.dtype}{value.shape}, expected {part.shape}")
        with failing_as(f"{self._where} cannot be written"):
            part.write(value).result()


def open_checkpoint(path: str) -> Checkpoint:
    """Opens a checkpoint by its path alone.

    Args:
      path: a step's folder, a folder of steps, or the workdir of a run (its newest step, as the
        first process sees it).
    """
    folder = epath.Path(from_first(lambda: os.fspath(_newest(path))))
    try:
        checksums.check(folder)
        items = restore(folder, about=True, tokenizer=None)
        about = items["about"]
        shape = ModelShape(**about["model"])
        return Checkpoint(folder, shape, about, items["tokenizer"]["model"].tobytes())
    except Exception as error:
        raise unreadable(folder, error) from error


def unreadable(path: epath.Path, error: Exception) -> UserError:
    """Says why a step cannot be read, and which one is before it."""
    step = int(path.name) if path.name.isdigit() else 0
    earlier = [other for other in committed_steps(path.parent) if other < step]
    instead = f"; the step before it is {path.parent / str(earlier[0])}" if earlier else ""
    return UserError(f"checkpoint {path} cannot be read: {reason(error)}{instead}")


def _newest(path: str) -> epath.Path:
    """The folder of the step that is meant by a path."""
    folder = absolute(path)
    for candidate in (folder / "checkpoints", folder):
        if candidate.exists() and (steps := committed_steps(candidate)):
            folder = candidate / str(steps[0])
            break
    if not (is_finished(folder) and (folder / "about").exists()):
        raise UserError(f"checkpoint {path}: no checkpoint there, expected a train workdir or step")
    return folder


def committed_steps(folder: epath.Path) -> Sequence[int]:
    """Steps whose checkpoint was finished, newest first."""
    return [step for step in numbered(folder) if is_finished(folder / str(step))]


def numbered(folder: epath.Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def is_finished(path: epath.Path) -> bool:
    """Whether Orbax committed this folder: by renaming it, or where renaming is copying (gs://)
    by a marker file, which `is_checkpoint_finalized` looks for."""
    return (path / MARK).exists() and ocp.utils.is_checkpoint_finalized(path)


def describe(shape: ModelShape, **facts: Any) -> dict[str, Any]:
    """The `about` of a checkpoint that this process writes."""
    about = {"format": 3, "model": vars(shape), **facts, "environment": environment()}
    return json.loads(json.dumps(about))


def restore(path: epath.Path, **items: Any) -> dict[str, Any]:
    """Reads items of a step: a tree of targets (strict), None (as on disk), True (JSON), or a pair
    of trees, of what has to be there and of what it is read as."""
    ignore_leftovers()
    arguments = {}
    for name, target in items.items():
        if target is True:
            arguments[name] = ocp.args.JsonRestore()
            continue
        if target is not None:
            stored, target = target if type(target) is tuple else (target, target)
            metadata = ocp.StandardCheckpointHandler().metadata(path / name)
            _check(metadata.tree, stored, path / name)
        arguments[name] = ocp.args.StandardRestore(target)
    # Not through a Checkpointer: it makes processes wait for one another, and where only one of
    # them meets a damaged file, the others would wait in vain.
    restored = ocp.CompositeCheckpointHandler().restore(path, ocp.args.Composite(**arguments))
    return dict(restored.items())


def _check(found: Any, target: Any, path: epath.Path) -> None:
    """Orbax casts dtypes silently; here every difference is an error that names its leaf."""

    def leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            "/".join(
                str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                for key in keys
            ): (
                tuple(leaf.shape),
                str(np.dtype(leaf.dtype)),
            )
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    there, here = leaves(found), leaves(target)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise UserError(
                f"checkpoint {path}: {name} is {_say(there.get(name))} there, "
                f"{_say(here.get(name))} expected"
            )


def _say(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
