"""What a cut list makes of a teacher, part by part; knows trees and shapes, no stages.

Every leaf of the small model is gathered along its logical axes from the leaf of the same name;
the table of axes in `model/decoder.py` says all that is needed. Parts that the teacher lacks start
neutral, so that the model computes the same with them.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.checkpoints.write import Part, parts_of
from pangu_tiny.errors import UserError
from pangu_tiny.inherit.correction import OUTPUTS, Correction
from pangu_tiny.inherit.cut_list import CutList
from pangu_tiny.model.decoder import PARAMETER_AXES, parameter_shapes
from pangu_tiny.model.init import SERIES_STD, STD
from pangu_tiny.model.shape import ModelShape

_TABLE, _HEAD = "embedding/table", "head/kernel"


@dataclasses.dataclass(frozen=True)
class Cutter:
    """A teacher on disk and how it is cut.

    Attributes:
      teacher, cuts: which was checked against it.
      tie: for an untied teacher and a tied model, the matrix that both become, "embedding" or
        "head"; None refuses.
      squares: mean square of what each norm reads (see `Importance.squares`); its weights are then
        multiplied by what the mean over fewer channels changes. None leaves them.
      correction: of the output projections; None leaves them.
      seed: of the random part of modules that the teacher lacks.
    """

    teacher: Checkpoint
    cuts: CutList
    tie: str | None = None
    squares: dict[str, np.ndarray] | None = None
    correction: Correction | None = None
    seed: int = 0

    def parts(self) -> Iterator[Part]:
        """Every part of the small model, in the order of `parts_of`."""
        for name, layer in parts_of(self.cuts.model):
            yield Part(name, layer, self._part(name, layer))

    def manifest(self) -> dict[str, Any]:
        """Where every leaf of the small model comes from, its shape before and after."""
        after = _shapes(self.cuts.model)
        before = _shapes(self.teacher.shape)
        lines = {}
        for name, shape in after.items():
            source = _source(name, before, self.tie)
            lines[name] = {
                "from": source or "new, neutral: the teacher has none",
                "before": before[source] if source else None,
                "after": shape,
            }
            if source and name.startswith("blocks/"):
                lines[name]["layers"] = self.cuts.layers
        used = {line["from"] for line in lines.values()}
        return {
            "teacher": self.teacher.digest,
            "leaves": lines,
            "not_taken": sorted(before.keys() - used),
        }

    def _part(self, name: str, layer: int | None) -> np.ndarray:
        before = _shapes(self.teacher.shape)
        source = _source(name, before, self.tie)
        if source is None:
            return self._neutral(name, layer)
        leaf = self.teacher.leaf(source)
        if leaf.shape != before[source]:
            raise UserError(
                f"teacher {self.teacher.path}: {source} is {list(leaf.shape)} there, "
                f"{list(before[source])} expected"
            )
        value = leaf.read(None if layer is None else self.cuts.layers[layer])
        if bad := int(np.sum(~np.isfinite(value))):
            where = source if layer is None else f"{source}, layer {self.cuts.layers[layer]}"
            raise UserError(
                f"teacher {self.teacher.path}: {where} has {bad:,} values that are NaN or "
                f"infinite, expected none"
            )
        axes = PARAMETER_AXES[source]
        axes = axes if layer is None else axes[1:]
        for place, axis in reversed(list(enumerate(axes))):  # the width first: less to correct
            if self.correction and OUTPUTS.get(name) == axis:
                kept: list[Any] = self.cuts.blocks[layer][axis]
                value = self.correction.cut(value, axis, self.cuts.layers[layer], kept)
            else:
                value = self._gather(value, place, axis, layer)
        if source != name and source in (_TABLE, _HEAD):
            value = value.T
        return self._calibrated(name, layer, self._with_terms(name, layer, value))

    def _gather(self, value: np.ndarray, place: int, axis: str, layer: int | None) -> np.ndarray:
        if axis == "vocab":
            return self._rows(value, place)
        if axis == "embed":
            indices: list[Any] = self.cuts.embed
        elif axis in ("kv_heads", "heads", "ffn", "bottleneck"):
            indices = self.cuts.blocks[layer][axis]
        else:
            return value
        return _take(value, indices, place)

    def _rows(self, value: np.ndarray, place: int) -> np.ndarray:
        """The rows of the vocabulary, padded with zeros."""
        shape, rows = self.cuts.model, self.cuts.vocabulary
        size = self.teacher.shape.vocab_size
        taken = np.take(value, range(size) if rows is None else rows, axis=place)
        padding = [(0, 0)] * value.ndim
        padding[place] = (0, shape.padded_vocab - shape.vocab_size)
        return np.pad(taken, padding)

    def _with_terms(self, name: str, layer: int | None, value: np.ndarray) -> np.ndarray:
        """More terms of the series activation than the teacher has."""
        if not name.endswith(("series_scale", "series_bias")):
            return value
        fresh = self._neutral(name, layer)[1:]  # 0 the first, those after it random and different
        more = self.cuts.model.series_terms - len(value)
        return np.concatenate([value, fresh[:more].astype(value.dtype)])

    def _calibrated(self, name: str, layer: int | None, value: np.ndarray) -> np.ndarray:
        if self.squares is None or name not in self.squares:
            return value
        squares_d = self.squares[name] if layer is None else self.squares[name][layer]
        factor = np.sqrt(squares_d[self.cuts.embed].mean() / squares_d.mean())
        return (value.astype(np.float32) * factor).astype(value.dtype)

    def _neutral(self, name: str, layer: int | None) -> np.ndarray:
        """A part with which the model computes what it does without: a shortcut that writes
        nothing yet, terms of the series that are 0. Only a third term and those after it have to
        differ from the second, which random scales do, as in a fresh model."""
        size = _shapes(self.cuts.model)[name][1:]
        place = list(PARAMETER_AXES).index(name)
        random = np.random.default_rng([self.seed, place, layer])
        if name == "blocks/shortcut/down":
            return (STD * random.standard_normal(size)).astype(np.float32)
        value = np.zeros(size, np.float32)
        if name == "blocks/ffn/series_scale":
            value[0] = 1
            value[2:] = SERIES_STD * random.standard_normal(value[2:].shape)
        return value


@functools.cache
def _shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        name: leaf.shape for name, leaf in flatten_dict(parameter_shapes(shape), sep="/").items()
    }


def _source(name: str, before: dict[str, Any], tie: str | None) -> str | None:
    """The leaf of the teacher that a leaf comes from; None where it has none."""
    if name == _HEAD and name not in before:
        return _TABLE
    if name == _TABLE and tie == "head" and _HEAD in before:
        return _HEAD
    return name if name in before else None


def _take(value: np.ndarray, indices: list[Any], place: int) -> np.ndarray:
    """Gathers along one axis; where an entry is a list, the mean of what it names."""
    firsts = [entry if type(entry) is int else entry[0] for entry in indices]
    taken = np.take(value, firsts, axis=place)
    for number, entry in enumerate(indices):
        if type(entry) is not int:
            parts = np.moveaxis(np.take(value, entry, axis=place).astype(np.float32), place, 0)
            weights = np.full(len(entry), 1 / len(entry), np.float32)
            mean = np.tensordot(weights, parts, axes=1).astype(value.dtype)
            taken[(slice(None),) * place + (number,)] = mean
    return taken
