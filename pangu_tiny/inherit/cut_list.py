"""The cut list: what a small model takes from a big one, as a file that can be read and edited.

cuts.json holds

    format      1
    teacher     digest of its checkpoint
    model       the ModelShape that comes out
    layers      layers of the teacher, from 0, one for each of the small model
    embed       residual channels that stay, the same in every layer, embedding and head
    blocks      for each layer of the small model: `kv_heads`, `heads`, `ffn`, `bottleneck`, numbers
                of what stays in that layer of the teacher. Query heads stand in the order of their
                key-value heads, equally many for each.
    repeated    whether key-value heads are repeated, so that every query head has its own
    vocabulary  null, where the rows stay as they are, or for each new id the old one
    tokenizer   digest of the compact tokenizer, or null

Where an entry of `kv_heads` is a list, the mean of these is taken. `bottleneck` is empty where the
teacher has no shortcut to cut.
"""

import dataclasses
import json
import typing
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.inherit.layers import check_layers
from pangu_tiny.inherit.structures import sizes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.typed import NO, convert, name_of
from pangu_tiny.workdir import read_json

CUTS = "cuts.json"

KV = ("drop", "repeat", "merge")
"""How key-value heads become fewer, see `inherit`."""

Index = int | list[int]
"""A structure of the teacher, or several of which the mean is taken."""


@dataclasses.dataclass(frozen=True)
class CutList:
    """See the head of this file; `blocks` is by layer, then by kind."""

    teacher: str
    model: ModelShape
    layers: list[int]
    embed: list[int]
    blocks: list[dict[str, list[Index]]]
    repeated: bool = False
    vocabulary: list[int] | None = None
    tokenizer: str | None = None

    def to_json(self) -> str:
        """One list a line, so that an editor and a diff can deal with it."""
        blocks = ",\n  ".join(map(json.dumps, self.blocks))
        facts = {"format": 1, "teacher": self.teacher, "model": vars(self.model)}
        facts |= {"layers": self.layers, "embed": self.embed, "repeated": self.repeated}
        facts |= {"vocabulary": self.vocabulary, "tokenizer": self.tokenizer}
        lines = [f'"{name}": {json.dumps(value)}' for name, value in facts.items()]
        return "{" + ",\n ".join([*lines, f'"blocks": [\n  {blocks}]']) + "}\n"

    @classmethod
    def read(cls, path: str) -> "CutList":
        """Reads a cuts.json, or the one in a folder of inherit."""
        file = epath.Path(path)
        if file.is_dir():
            file = file / CUTS
        wrong = (ValueError, TypeError, KeyError, AttributeError)
        with failing_as(f"cuts {file} is not what inherit writes", *wrong):
            facts = read_json(file)
            if (version := facts.pop("format")) != 1:
                raise UserError(f"cuts {file} has format {version!r}, expected 1")
            model = ModelShape(**_typed(facts.pop("model"), ModelShape, f"cuts {file}: model."))
            return cls(model=model, **_typed(facts, cls, f"cuts {file}: "))

    def check(self, teacher: ModelShape) -> None:
        """Refuses a list that the teacher cannot be cut by, or that is not what its model says."""
        model, there = self.model, sizes(teacher)
        _check_same(teacher, model)
        check_layers("cuts: layers", self.layers, teacher.depth, model.depth)
        _check_indices("cuts: embed", self.embed, there["embed"], model.width)
        if len(self.blocks) != model.depth:
            raise UserError(f"cuts: {len(self.blocks)} blocks, expected {model.depth}")
        wanted = sizes(model) | ({} if teacher.bottleneck else {"bottleneck": 0})
        for layer, block in enumerate(self.blocks):
            where = f"cuts: blocks[{layer}]"
            kinds = ["kv_heads", "heads", "ffn", "bottleneck"]
            if sorted(block) != sorted(kinds):
                raise UserError(f"{where} has {', '.join(block)}, expected {', '.join(kinds)}")
            for kind in kinds:
                again = kind == "kv_heads" and self.repeated
                _check_indices(f"{where}.{kind}", block[kind], there[kind], wanted[kind], again)
            _check_groups(where, block, teacher, model)
        if self.vocabulary is not None:
            rows = f"{model.vocab_size} rows, one for each id of the small model"
            if len(self.vocabulary) != model.vocab_size:
                raise UserError(f"cuts: vocabulary has {len(self.vocabulary)}, expected {rows}")
            for old in self.vocabulary:
                _check_range("cuts: vocabulary", old, teacher.vocab_size)
        elif model.vocab_size != teacher.vocab_size:
            raise UserError(
                f"ModelShape.vocab_size is {model.vocab_size}, the teacher has "
                f"{teacher.vocab_size}: give inherit.tokenizer, a folder of compress-tokenizer"
            )


def _typed(facts: dict[str, Any], target: type, where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(target)
    values = {name: convert(value, hints.get(name, Any)) for name, value in facts.items()}
    for name, value in values.items():
        if value is NO:
            raise UserError(f"{where}{name} is not a {name_of(hints[name])}")
    return values


def _flat(entries: list[Any]) -> list[Any]:
    return [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]


def _check_same(teacher: ModelShape, model: ModelShape) -> None:
    """What cannot be cut has to be as it is in the teacher."""
    for name in ("head_dim", "rope_theta", "norm_eps"):
        if getattr(model, name) != getattr(teacher, name):
            raise UserError(
                f"ModelShape.{name} is {getattr(model, name)}, the teacher has "
                f"{getattr(teacher, name)}, expected the same"
            )
    if model.series_terms < teacher.series_terms:
        raise UserError(
            f"ModelShape.series_terms is {model.series_terms}, the teacher has "
            f"{teacher.series_terms}, which cannot be cut: expected at least as many"
        )


def _check_indices(
    where: str, found: Any, available: int, wanted: int, again: bool = False
) -> None:
    if not isinstance(found, list) or len(found) != wanted:
        count = len(found) if isinstance(found, list) else repr(found)
        raise UserError(f"{where} has {count} entries, expected {wanted}")
    merged = where.endswith("kv_heads")  # nothing else is averaged
    if any(isinstance(entry, list) and not (merged and entry) for entry in found):
        raise UserError(f"{where} has a list in it, expected numbers")
    flat = _flat(found)
    for item in flat:
        _check_range(where, item, available)
    if not again and len(set(flat)) != len(flat):
        twice = next(item for item in flat if flat.count(item) > 1)
        raise UserError(f"{where} has {twice} twice, expected each at most once")


def _check_range(where: str, item: Any, available: int) -> None:
    if type(item) is not int or not 0 <= item < available:
        raise UserError(f"{where} has {item!r}, expected numbers from 0 to {available - 1}")


def _check_groups(
    where: str, block: dict[str, list[Any]], teacher: ModelShape, model: ModelShape
) -> None:
    """Every query head must go with the key-value head that it reads from."""
    per_group = model.heads // model.kv_heads
    for place, head in enumerate(block["heads"]):
        entry = block["kv_heads"][place // per_group]
        reads = head // (teacher.heads // teacher.kv_heads)
        if reads not in (entry if isinstance(entry, list) else [entry]):
            raise UserError(
                f"{where}.heads[{place}] is {head}, which reads key-value head {reads} of the "
                f"teacher, but stands with {entry} of kv_heads: expected {per_group} query heads "
                f"for each key-value head, in their order"
            )


def plan(
    teacher: ModelShape,
    teacher_digest: str,
    model: ModelShape,
    layers: list[int],
    scores: dict[str, np.ndarray] | None,
    *,
    kv: str = "drop",
    vocabulary: list[int] | None = None,
    tokenizer: str | None = None,
) -> CutList:
    """The cut list that keeps what matters most; ties: the first.

    Args:
      scores: by kind, "embed" [width], others [layers, structures]; None where nothing is cut.
      kv: one of `KV`.
    """
    check_fits(teacher, model, kv)
    embed = _best(scores, "embed", model.width, teacher.width)
    blocks = []
    for place in range(len(layers)):
        found = scores and {kind: x[place] for kind, x in scores.items() if kind != "embed"}
        kv_heads, heads = _choose_heads(found, teacher, model, kv)
        block: dict[str, list[Any]] = {"kv_heads": kv_heads, "heads": heads}
        block["ffn"] = _best(found, "ffn", model.ffn_width, teacher.ffn_width)
        kept = model.bottleneck if teacher.bottleneck else 0
        block["bottleneck"] = _best(found, "bottleneck", kept, teacher.bottleneck)
        blocks.append(block)
    repeated = kv == "repeat"
    return CutList(teacher_digest, model, layers, embed, blocks, repeated, vocabulary, tokenizer)


def check_fits(teacher: ModelShape, model: ModelShape, kv: str) -> None:
    """Refuses a shape that cannot be cut out of a teacher."""
    _check_same(teacher, model)
    for name in ("depth", "width", "heads", "ffn_width"):
        if getattr(model, name) > getattr(teacher, name):
            raise UserError(
                f"ModelShape.{name} is {getattr(model, name)}, the teacher has only "
                f"{getattr(teacher, name)}"
            )
    if teacher.bottleneck and model.bottleneck > teacher.bottleneck:
        raise UserError(
            f"ModelShape.shortcut_ratio makes a shortcut of {model.bottleneck} channels, the "
            f"teacher has only {teacher.bottleneck}"
        )
    groups, per_group = teacher.kv_heads, teacher.heads // teacher.kv_heads
    small, each = model.kv_heads, model.heads // model.kv_heads
    if kv == "repeat" and each != 1:
        raise UserError(
            f"kv = 'repeat' gives every query head its own, but ModelShape.kv_heads is "
            f"{small} with ModelShape.heads {model.heads}: expected as many"
        )
    if kv == "merge":
        if groups % small or each > per_group * (groups // small):
            raise UserError(
                f"kv = 'merge' takes means of neighbours, but the teacher has {groups} "
                f"key-value heads and ModelShape.kv_heads is {small}: expected a divisor, with at "
                f"most {per_group} query heads for each that is merged"
            )
    elif kv == "drop" and (small > groups or each > per_group):
        raise UserError(
            f"ModelShape has {small} key-value heads with {each} query heads each, the teacher "
            f"{groups} with {per_group}: expected no more of either; kv = 'repeat' first gives "
            f"every query head its own, kv = 'merge' takes means"
        )


def _best(scores: dict[str, np.ndarray] | None, kind: str, kept: int, available: int) -> list[int]:
    if kept in (0, available):
        return list(range(kept))
    if scores is None:
        raise UserError(
            f"the small model has {kept} of {available} {kind}: which ones stay needs "
            f"inherit.importance, a folder of rank-teacher"
        )
    return sorted(np.argsort(-scores[kind], kind="stable")[:kept].tolist())


def _choose_heads(
    scores: dict[str, np.ndarray] | None,
    teacher: ModelShape,
    model: ModelShape,
    kv: str,
) -> tuple[list[Index], list[int]]:
    """Key-value heads first, then equally many query heads of each."""
    per_group = teacher.heads // teacher.kv_heads
    each = model.heads // model.kv_heads
    if kv == "repeat":
        heads = _best(scores, "heads", model.heads, teacher.heads)
        return [head // per_group for head in heads], heads
    if kv == "merge":
        size = teacher.kv_heads // model.kv_heads
        groups = [list(range(first, first + size)) for first in range(0, teacher.kv_heads, size)]
        kv_heads: list[Index] = [group[0] if size == 1 else group for group in groups]
    else:
        kept = _best(scores, "kv_heads", model.kv_heads, teacher.kv_heads)
        kv_heads, groups = list(kept), [[head] for head in kept]
    heads = []
    for group in groups:
        mine = [head * per_group + place for head in group for place in range(per_group)]
        within = scores and {"heads": scores["heads"][mine]}
        heads += [mine[place] for place in _best(within, "heads", each, len(mine))]
    return kv_heads, heads
