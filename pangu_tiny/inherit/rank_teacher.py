"""The stage `rank-teacher`: what matters in a big model, measured once for many cuts of it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from pangu_tiny.arrays import read_arrays, write_arrays
from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches, held_out_batches
from pangu_tiny.errors import UserError
from pangu_tiny.inherit import masks, measure, report
from pangu_tiny.inherit.correction import gram_file, write_gram
from pangu_tiny.inherit.cut_list import check_fits
from pangu_tiny.inherit.importance import ABOUT, Importance, layer_scores
from pangu_tiny.inherit.layers import WINDOWS, LayerChoice
from pangu_tiny.inherit.masks import MaskState, MaskTraining
from pangu_tiny.inherit.structures import masked_shape, select_layers
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.step import Objective, param_shardings
from pangu_tiny.progress import Progress
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import check_divides, make_mesh, named_sharding
from pangu_tiny.topology.processes import alone, first, from_first, say
from pangu_tiny.training.train import DTYPES
from pangu_tiny.workdir import claim_together, environment

METHODS = ("l1", "l2", "taylor", "activation", "learned")
_DATA_FREE = ("l1", "l2")


def rank_teacher(
    teacher: str,
    workdir: str,
    hardware: Hardware,
    layer_choice: LayerChoice,
    mask_training: MaskTraining,
    dataset: str | None = None,
    method: str = "learned",
    model: ModelShape | None = None,
    repeat_kv: bool = False,
    merge_kv: bool = False,
    output_grams: bool = False,
    calibration_batches: int = 32,
    batch_size: int = 16,
    dtype: str = "float32",
    seed: int = 0,
) -> Importance:
    """Measures the importance of all that can be dropped from a teacher.

    Layers come first: with `model`, those are chosen that stay at its depth, and all else is
    measured on the teacher without the others.

    Args:
      teacher: its checkpoint, from import-hf or train.
      workdir: the folder to write.
      hardware: how the work is laid out; free.
      layer_choice: which layers stay.
      mask_training: of the learned masks.
      dataset: workdir of prepare-data, in the teacher's own ids. Layers are measured on its
        held-out split, unless the choice among them needs no measure; all else on its training
        split. None measures no layers and allows only "l1" and "l2".
      method: "l1" and "l2" are norms of the weights, "taylor" is |weight · gradient|, "activation"
        the mean size of what a structure puts out, "learned" a mask that is trained; it has the
        best score in the paper.
      model: the shape that is to be cut; "learned" needs it, for the others its depth matters
        alone. None measures on the whole teacher.
      repeat_kv, merge_kv: as inherit will be asked to; learned masks are trained for it.
      output_grams: also measure what `inherit.correct_outputs` needs, on the training split. Costs
        2 × [layers, features, features] float32 over all devices while it runs and once that on
        disk, features being neurons, and heads × head_dim.
      calibration_batches: how many are measured, of each split; what is held out may be less.
      batch_size: sequences in one, over all devices.
      dtype: of matrix products and activations.
      seed: of the order of the data, and of the noise of learned masks.

    Returns:
      What was found, as it lies in the workdir.

    Raises:
      UserError: of the arguments, of a checkpoint or dataset that do not fit, or a workdir of
        another ranking.
    """
    opened = open_checkpoint(teacher)
    rows = TokenDataset.open(dataset) if dataset else None
    _check(opened, rows, method, model, layer_choice, calibration_batches, dtype)
    if output_grams and rows is None:
        raise UserError("rank_teacher.output_grams needs rank_teacher.dataset")
    layer_choice = layer_choice.at((model or opened.shape).depth)
    if model:
        check_fits(opened.shape, model, repeat_kv, merge_kv)
        layer_choice.choose(opened.shape.depth, model.depth, np.zeros(opened.shape.depth))
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    check_divides(opened.shape, mesh)
    identity = {
        "teacher": opened.digest,
        "dataset": rows and rows.digest,
        "method": method,
        "model": model and vars(model),
        "layer_choice": vars(layer_choice),
        "mask_training": mask_training.identity() if method == "learned" else None,
        "repeat_kv": repeat_kv,
        "merge_kv": merge_kv,
        "output_grams": output_grams,
        "calibration_batches": calibration_batches,
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
    }
    feed = Feed(mesh, batch_size, hardware.per_device_batch, "rank_teacher.batch_size")
    folder = claim_together(workdir, "rank-teacher", identity)
    if from_first((folder / ABOUT).exists):
        return Importance.open(workdir)
    kv = {"repeat_kv": repeat_kv, "merge_kv": merge_kv}
    work = _Work(opened, rows, hardware, dtype, mesh, feed, folder, calibration_batches, seed)
    with jax.set_mesh(mesh):
        params = opened.params(param_shardings(opened.shape, mesh))
        measures = model is None or layer_choice.measures
        arrays = work.layers(params) if rows and measures else {}
        layers = list(range(opened.shape.depth))
        if model and model.depth < len(layers):
            scores = layer_scores(arrays, layer_choice)
            layers = layer_choice.choose(len(layers), model.depth, scores)
            params = select_layers(params, layers)
        say(f"ranking by {method} on layers {layers}")
        if output_grams:
            work.grams(params, layers)
        arrays |= work.structures(params, method, model, mask_training, len(layers), kv)
    about = {
        **identity,
        "teacher_shape": vars(opened.shape),
        "layers": layers,
        "environment": environment(),
    }
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(
            f"teacher {opened.path} cannot be ranked: {', '.join(bad)} came out NaN or infinite"
        )
    found = Importance(about, arrays)
    with alone() as leads:
        if leads:
            report.write_ranking(folder, found)
            found.write(folder)
            for path in folder.glob("partial_*.npz"):
                path.unlink()
    say(f"importance {folder}\n  report       {folder / 'report.html'}")
    return found


def _check(
    opened: Checkpoint,
    rows: TokenDataset | None,
    method: str,
    model: ModelShape | None,
    layer_choice: LayerChoice,
    count: int,
    dtype: str,
) -> None:
    if method not in METHODS:
        raise UserError(f"rank_teacher.method is {method!r}, expected one of {', '.join(METHODS)}")
    if dtype not in DTYPES:
        raise UserError(f"rank_teacher.dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if count < 1:
        raise UserError(f"rank_teacher.calibration_batches is {count}, expected at least 1")
    if method == "learned" and model is None:
        raise UserError("rank_teacher.method = 'learned' needs the shape to cut: bind ModelShape.*")
    if rows is None:
        if method not in _DATA_FREE:
            raise UserError(
                f"rank_teacher.method = {method!r} needs rank_teacher.dataset; without one, "
                f"choose {' or '.join(_DATA_FREE)}"
            )
        if model and layer_choice.measures and model.depth < opened.shape.depth:
            raise UserError(
                "LayerChoice.rule = 'importance' needs rank_teacher.dataset; without one, choose "
                "'even' or 'listed'"
            )
        return
    if (
        model
        and model.depth < opened.shape.depth
        and layer_choice.measures
        and layer_choice.score != "influence"
        and not rows.rows("held_out")
    ):
        raise UserError(
            f"LayerChoice.score = {layer_choice.score!r} needs held-out rows, dataset {rows.path} "
            f"has none; choose 'influence', or a rule that measures nothing"
        )
    opened.check_rows(rows)


class _Work:
    """The measurements on one teacher, each kept in the folder while it is under way."""

    def __init__(
        self,
        opened: Checkpoint,
        rows: TokenDataset | None,
        hardware: Hardware,
        dtype: str,
        mesh: Mesh,
        feed: Feed,
        folder: epath.Path,
        count: int,
        seed: int,
    ):
        self._shape, self._rows, self._hardware = opened.shape, rows, hardware
        self._dtype, self._mesh, self._feed = DTYPES[dtype], mesh, feed
        self._folder, self._count, self._seed = folder, count, seed

    def layers(self, params: dict[str, Any]) -> dict[str, np.ndarray]:
        """Rises of the held-out loss with layers skipped, and the influence of each layer."""
        rows, depth = self._rows, self._shape.depth
        arrays = {}
        if held_out := rows.rows("held_out"):
            count = min(self._count, -(-held_out // self._batch_size))
            skip = measure.skipping(self._objective(self._shape), self._mesh, depth)
            totals = self._total("layers", "layers skipped", self._held_out, count, params, skip)
            for window in WINDOWS:
                if (name := f"skip_{window}") in totals:
                    arrays[name] = (totals[name] - totals["base"]) / totals["targets"]
        look = measure.looking(self._decoder(self._shape), rows.begin_id, rows.end_id, self._mesh)
        totals = self._total("influence", "influence", self._train, self._count, params, look)
        return {**arrays, "influence": totals["influence"] / totals["batches"]}

    def grams(self, params: dict[str, Any], layers: list[int]) -> None:
        """Writes the Gram matrices of a teacher that has these layers alone, if they are not there.

        Nothing is saved on the way: totals are as large as a model, and all that is done again
        after an interruption are forward passes.
        """
        files = [gram_file(self._folder, kind, n) for kind in ("heads", "ffn") for n in layers]
        if from_first(lambda: all(file.exists() for file in files)):
            return
        decoder = self._decoder(dataclasses.replace(self._shape, depth=len(layers)))
        rows = self._rows
        zeros, add = measure.grams(decoder, rows.begin_id, rows.end_id, self._mesh)
        totals = zeros()
        with Progress("output grams", self._count, "batch", shown=first()) as progress:
            for rows_abt in itertools.islice(self._train(), self._count):
                totals = jax.block_until_ready(add(totals, params, rows_abt))
                progress.update()
        one = jax.jit(lambda lff, n: lff[n], out_shardings=named_sharding(self._mesh, ()))
        for kind, total_lff in totals.items():
            for place, layer in enumerate(layers):
                gram_ff = np.asarray(one(total_lff, place)) / np.float32(self._count)
                with alone() as leads:
                    if leads:
                        write_gram(self._folder, kind, layer, gram_ff)

    def structures(
        self,
        params: dict[str, Any],
        method: str,
        model: ModelShape | None,
        training: MaskTraining,
        depth: int,
        kv: dict[str, bool],
    ) -> dict[str, np.ndarray]:
        """Importance of all but layers, of a teacher with `depth` of them."""
        shape = ModelShape(**{**vars(self._shape), "depth": depth})
        decoder = self._decoder(shape)
        if method in _DATA_FREE:
            sums = measure.magnitudes(decoder, _DATA_FREE.index(method) + 1, self._mesh)(params)
            found = {name: np.asarray(x, np.float64) for name, x in jax.device_get(sums).items()}
        if self._rows is None:
            return found
        look = measure.looking(decoder, self._rows.begin_id, self._rows.end_id, self._mesh)
        looked = self._mean("activation", params, look)
        squares = {name: x for name, x in looked.items() if name.startswith("square/")}
        if method == "activation":
            found = {name: x for name, x in looked.items() if name not in squares}
            del found["influence"]  # of the whole teacher it was measured before
        elif method == "taylor":
            found = self._taylor(params, shape)
        elif method == "learned":
            found = self._learned(params, shape, model, training, kv)
        return {**squares, **found}

    def _taylor(self, params: dict[str, Any], shape: ModelShape) -> dict[str, np.ndarray]:
        return self._mean("taylor", params, measure.first_order(self._objective(shape), self._mesh))

    def _learned(
        self,
        params: dict[str, Any],
        shape: ModelShape,
        model: ModelShape,
        training: MaskTraining,
        kv: dict[str, bool],
    ) -> dict[str, np.ndarray]:
        wanted = masks.targets(shape, model, **kv)
        groups = masks.head_groups(shape, model, **kv)
        scores = None
        if training.start == "taylor":
            taylor = self._taylor(params, shape)
            scores = {**taylor, "embed": taylor["embed"].sum(axis=0) + taylor["embed_outside"]}
        objective = self._objective(masked_shape(shape, model.width))
        init, step = masks.mask_step(objective, wanted, training, self._mesh, self._seed)
        saved = self._folder / "partial_masks.npz"
        state = init(masks.first_logits(shape, groups, scores))
        if from_first(saved.exists):
            state = _restore(read_arrays(saved), state)
        start = int(state.step)
        pending: jax.Array | None = None
        progress = Progress("learned masks", training.steps, "step", start, shown=first())

        def finish() -> None:
            """Reads the loss of the step before the one in flight."""
            if pending is not None:
                progress.update(loss=f"{float(pending):.3f}")

        with progress:
            left = itertools.islice(self._train(start), training.steps - start)
            for done, rows_abt in enumerate(left, start + 1):
                state, loss = step(state, params, rows_abt)
                finish()
                pending = loss
                with alone() as leads:
                    if leads and done % training.save_every == 0:
                        write_arrays(saved, _arrays(state))
            finish()
        return masks.final_scores(jax.device_get(state.logits))

    def _decoder(self, shape: ModelShape) -> Decoder:
        hardware = self._hardware
        return Decoder(shape, self._dtype, hardware.attention, hardware.remat, hardware.unroll)

    def _objective(self, shape: ModelShape) -> Objective:
        rows = self._rows
        return Objective(
            self._decoder(shape), rows.begin_id, rows.end_id, self._hardware.loss_chunk
        )

    @property
    def _batch_size(self) -> int:
        return self._feed.accumulation * self._feed.rows_at_once

    def _train(self, start: int = 0) -> Iterator[jax.Array]:
        return self._place(
            batches(
                self._rows,
                "train",
                self._batch_size,
                self._seed,
                positions=self._feed.positions,
                start=start,
            )
        )

    def _held_out(self, start: int) -> Iterator[jax.Array]:
        whole = held_out_batches(self._rows, self._batch_size, self._feed.positions)
        return itertools.islice(self._place(whole), start, None)

    def _place(self, local: Iterator[dict[str, np.ndarray]]) -> Iterator[jax.Array]:
        for batch in local:
            yield self._feed.place(batch, np.zeros(2, bool)).rows_abt

    def _mean(
        self, name: str, params: dict[str, Any], figures: measure.Measure
    ) -> dict[str, np.ndarray]:
        totals = self._total(name, name, self._train, self._count, params, figures)
        count = totals.pop("batches")
        return {name: total / count for name, total in totals.items()}

    def _total(
        self,
        name: str,
        label: str,
        rows: Callable[[int], Iterator[jax.Array]],
        count: int,
        params: dict[str, Any],
        figures: measure.Measure,
    ) -> dict[str, np.ndarray]:
        saved = self._folder / f"partial_{name}.npz"
        return measure.total_over(rows, count, lambda x: figures(params, x), saved, label)


def _arrays(state: MaskState) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _restore(arrays: dict[str, np.ndarray], state: MaskState) -> MaskState:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(arrays[jax.tree_util.keystr(path)], leaf.sharding), state
    )
