"""The stage `inherit`: a small checkpoint cut out of a big one.

The folder that it writes holds

    cuts.json       the cut list, see `inherit/cut_list.py`
    manifest.json   where every leaf comes from, its shape before and after, what was not taken
    checkpoints/0   the small model, to be trained on from: `train.checkpoint`
"""

import hashlib
import json
import math
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.checkpoints.write import FLOATS, write_parts
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.inherit.correction import Correction
from pangu_tiny.inherit.cut_list import CUTS, KV, CutList, plan
from pangu_tiny.inherit.cutter import Cutter
from pangu_tiny.inherit.importance import Importance, layer_scores
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.vocabulary.id_map import IdMap
from pangu_tiny.workdir import absolute, check_same, claim, write_atomically

TIES = ("embedding", "head")


class _Tokenizer(NamedTuple):
    """The tokenizer of the small model; `vocabulary` is None where it is the teacher's own."""

    model_bytes: bytes
    digest: str | None
    begin_id: int
    end_id: int
    vocabulary: list[int] | None


def inherit(
    teacher: str,
    workdir: str,
    layer_choice: LayerChoice,
    model: ModelShape | None = None,
    importance: str | None = None,
    tokenizer: str | None = None,
    cuts: str | None = None,
    cuts_only: bool = False,
    kv: str = "drop",
    tie: str | None = None,
    calibrate_norms: bool = False,
    correct_outputs: bool = False,
    ridge: float = 1e-3,
    as_ranking: bool = False,
    dtype: str | None = None,
    seed: int = 0,
) -> CutList:
    """Cuts a teacher down to a small shape, a layer at a time, whatever its size.

    Args:
      teacher: its checkpoint, from import-hf or train.
      workdir: the folder to write.
      layer_choice: which layers stay.
      model: the shape to make; the one in `cuts` where that is given.
      importance: workdir of rank-teacher, of the same teacher; needed where width, heads, neurons
        or the shortcut are cut.
      tokenizer: folder of compress-tokenizer; its id map says which rows of the vocabulary stay.
        None leaves the vocabulary whole.
      cuts: an edited cuts.json, in place of what importance would choose.
      cuts_only: write cuts.json and stop.
      kv: how a grouped-query teacher loses key-value heads: "drop" the least important ones;
        "repeat" each for its query heads first, for a small shape with as many key-value as query
        heads; "merge", the mean of neighbours (the paper's appendix on grouped queries).
      tie: for a teacher with a head of its own and a tied small model, the matrix that is taken:
        "embedding" or "head". None refuses.
      calibrate_norms: multiply the weights of the norms by what the mean over fewer channels
        changes, as measured by rank-teacher.
      correct_outputs: change the output projections of attention and feed-forward so that they
        make up for the heads and neurons that were dropped, by least squares on the teacher's
        activations (see `inherit/correction.py`); needs importance with
        `rank_teacher.output_grams`. Refused where key-value heads are merged: what heads put out
        then was never measured.
      ridge: of that correction, a share of the mean square of what is read. Not in the paper:
        chosen far above the rounding of float32 sums and far below what is read.
      as_ranking: take learned masks as a ranking, for another shape than they were trained for.
      dtype: of the small checkpoint, "float32", "bfloat16" or "float16"; None is the teacher's.
      seed: of the random part of modules that the teacher lacks.
    """
    check_number("inherit.seed", seed, 0)
    check_number("inherit.ridge", ridge, above=0, below=math.inf)
    check_one_of("inherit.kv", kv, KV)
    check_one_of("inherit.tie", tie, (None, *TIES))
    check_one_of("inherit.dtype", dtype, (None, *FLOATS))
    if cuts and kv != "drop":
        raise UserError("inherit.cuts says which heads stay, expected no inherit.kv")
    opened = open_checkpoint(teacher)
    ranking = _open_ranking(importance, opened) if importance else None
    small = _read_tokenizer(opened, tokenizer)
    if cuts:
        cut_list = _read_cuts(cuts, opened, small, model)
    else:
        if ranking and model and not as_ranking:
            ranking.check_shape(model, kv)
        cut_list = _plan(opened, ranking, model, layer_choice, small, kv)
    cut_list.check(opened.shape)
    _check_options(opened, cut_list, ranking, tie, calibrate_norms, correct_outputs)
    text = cut_list.to_json()
    identity = {
        "teacher": opened.digest,
        "cuts": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer": small.digest,
        "tie": tie,
        "new_rows": "mean",  # as version 0.1 has it, whose digests stay
        "times": None,
        "calibrate_norms": ranking.digest if calibrate_norms else None,
        "correct_outputs": [ranking.digest, ridge] if correct_outputs else None,
        "dtype": dtype or str(opened.dtype),
        "seed": seed,
    }
    folder = claim(workdir, "inherit", identity)
    if (folder / CUTS).exists() and (folder / CUTS).read_text() != text:
        raise UserError(
            f"{folder / CUTS} was edited: give it as inherit.cuts, with another inherit.workdir"
        )
    write_atomically(folder / CUTS, text)
    if cuts_only:
        print(f"cut list {folder / CUTS}: edit it, and give it as inherit.cuts")
        return cut_list
    squares = ranking.squares(cut_list.layers) if calibrate_norms else None
    correction = Correction(absolute(importance), ridge) if correct_outputs else None
    _write(folder, Cutter(opened, cut_list, tie, squares, correction, seed), small, identity)
    return cut_list


def _open_ranking(folder: str, opened: Checkpoint) -> Importance:
    ranking = Importance.open(folder)
    ranked = ranking.about["teacher"]
    check_same(f"importance {folder} is of teacher", ranked, f"{opened.path} is", opened.digest)
    return ranking


def _write(folder: epath.Path, cutter: Cutter, small: _Tokenizer, identity: dict[str, Any]) -> None:
    """Writes checkpoint and manifest, and tells what became of the teacher."""
    teacher, cuts = cutter.teacher, cutter.cuts
    path = write_parts(
        folder / "checkpoints",
        cuts.model,
        identity["dtype"],
        cutter.parts(),
        small.model_bytes,
        label="inherit",
        identity=identity,
        begin_id=small.begin_id,
        end_id=small.end_id,
        sequence_length=teacher.about["sequence_length"],
    )
    manifest = cutter.manifest()
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1))
    print(
        f"inherited {teacher.shape.parameters / 1e6:,.1f}M → {cuts.model.parameters / 1e6:,.1f}M "
        f"parameters, layers {cuts.layers} of {teacher.shape.depth}: {path}"
    )
    for name, line in manifest["leaves"].items():
        if line["before"] is None:
            print(f"  new, neutral  {name}")
    for name in manifest["not_taken"]:
        print(f"  not taken     {name}")
    print(f"train on from it: train.checkpoint = {str(folder)!r}")


def _check_options(
    opened: Checkpoint,
    cuts: CutList,
    ranking: Importance | None,
    tie: str | None,
    calibrate_norms: bool,
    correct_outputs: bool,
) -> None:
    """Checks the options that depend on teacher, cut list and ranking."""
    check_tie(opened.shape, cuts.model, tie)
    if calibrate_norms and (ranking is None or ranking.squares(cuts.layers) is None):
        raise UserError(
            "inherit.calibrate_norms needs inherit.importance, of a rank-teacher with a dataset"
        )
    if correct_outputs:
        _check_correction(ranking, cuts)


def check_tie(teacher: ModelShape, model: ModelShape, tie: str | None) -> None:
    """Refuses `inherit.tie` where it is missing, or chooses nothing."""
    if (ties := model.tied and not teacher.tied) != (tie is not None):
        raise UserError(
            "ModelShape.tied is True, but the teacher has a head of its own: choose the matrix "
            "that is taken for both, inherit.tie = 'embedding' or 'head'"
            if ties
            else f"inherit.tie is {tie!r}, but no two matrices become one: expected None"
        )


def _check_correction(ranking: Importance | None, cuts: CutList) -> None:
    if ranking is None or not ranking.has_grams(cuts.layers):
        raise UserError(
            "inherit.correct_outputs needs inherit.importance, of a rank-teacher with "
            "rank_teacher.output_grams = True"
        )
    for layer, block in enumerate(cuts.blocks):
        for entry in block["kv_heads"]:
            if isinstance(entry, list) and len(entry) > 1:
                raise UserError(
                    f"inherit.correct_outputs is for heads of the teacher, but the cut list has "
                    f"means of key-value heads, {entry} in blocks[{layer}]: expected one of both"
                )


def _read_tokenizer(opened: Checkpoint, folder: str | None) -> _Tokenizer:
    about = opened.about
    if folder is None:
        return _Tokenizer(
            opened.tokenizer_bytes,
            about["identity"]["tokenizer"],
            about["begin_id"],
            about["end_id"],
            None,
        )
    id_map = IdMap.open(folder)
    cut_from, own = id_map.old_digest, about["identity"]["tokenizer"]
    if cut_from != own:
        opened.sentencepiece()  # without one, no tokenizer was cut out of its own
    check_same(f"tokenizer {folder} was cut out of", cut_from, f"teacher {opened.path} has", own)
    compact = id_map.tokenizer()
    return _Tokenizer(
        compact.model_bytes, compact.digest, compact.begin_id, compact.end_id, id_map.new_to_old
    )


def _read_cuts(
    path: str, opened: Checkpoint, small: _Tokenizer, model: ModelShape | None
) -> CutList:
    cut_list = CutList.read(path)
    check_same(f"cuts {path} are of teacher", cut_list.teacher, f"{opened.path} is", opened.digest)
    if model is not None and cut_list.model != model:
        raise UserError(f"cuts {path} make {cut_list.model}, but ModelShape is bound to {model}")
    wanted = small.digest if small.vocabulary is not None else None
    check_same(f"cuts {path} are for tokenizer", cut_list.tokenizer, "inherit.tokenizer is", wanted)
    return cut_list


def _plan(
    opened: Checkpoint,
    ranking: Importance | None,
    model: ModelShape | None,
    layer_choice: LayerChoice,
    small: _Tokenizer,
    kv: str,
) -> CutList:
    if model is None:
        raise UserError("inherit needs the shape to make: bind ModelShape.*, or give inherit.cuts")
    depth, scores = opened.shape.depth, None
    if layer_choice.measures and model.depth < depth:
        if ranking is None:
            raise UserError(
                "LayerChoice.rule = 'importance' needs inherit.importance, a folder of "
                "rank-teacher; without one, choose 'even' or 'listed'"
            )
        scores = layer_scores(ranking.arrays, layer_choice)
    layers = layer_choice.choose(depth, model.depth, scores)
    return plan(
        opened.shape,
        opened.digest,
        model,
        layers,
        ranking.structures(layers) if ranking else None,
        kv=kv,
        vocabulary=small.vocabulary,
        tokenizer=small.digest if small.vocabulary is not None else None,
    )
