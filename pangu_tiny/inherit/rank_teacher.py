"""The stage `rank-teacher`: what matters in a big model, measured once for many cuts of it."""

import jax
import numpy as np

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.inherit.calibration import WEIGHT_NORMS, Calibration
from pangu_tiny.inherit.cut_list import KV, check_fits
from pangu_tiny.inherit.importance import ABOUT, Importance, layer_scores
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.masks import MaskTraining
from pangu_tiny.inherit.report import report_of
from pangu_tiny.inherit.structures import select_layers
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.batch import BatchLayout
from pangu_tiny.program.build import DTYPES, build
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import alone, from_first, say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.workdir import environment

METHODS = (*WEIGHT_NORMS, "taylor", "activation", "learned")


def rank_teacher(
    teacher: str,
    workdir: str,
    hardware: Hardware,
    layer_choice: LayerChoice,
    mask_training: MaskTraining,
    dataset: str | None = None,
    method: str = "learned",
    model: ModelShape | None = None,
    kv: str = "drop",
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
      kv: as inherit will be asked to; learned masks are trained for it.
      output_grams: also measure what `inherit.correct_outputs` needs, on the training split. Costs
        2 × [layers, features, features] float32 over all devices while it runs and once that on
        disk, features being neurons, and heads × head_dim.
      calibration_batches: how many are measured, of each split; what is held out may be less.
      batch_size: sequences in one, over all devices.
      dtype: of matrix products and activations.
      seed: of the order of the data, and of the noise of learned masks.
    """
    check_method(method, model)
    check_one_of("rank_teacher.kv", kv, KV)
    check_one_of("rank_teacher.dtype", dtype, DTYPES)
    check_number("rank_teacher.calibration_batches", calibration_batches, 1)
    opened = open_checkpoint(teacher)
    data = TokenDataset.open(dataset) if dataset else None
    _check(opened, data, method, model, layer_choice, output_grams)
    layer_choice = layer_choice.at((model or opened.shape).depth)
    if model:
        check_fits(opened.shape, model, kv)
        layer_choice.choose(opened.shape.depth, model.depth, np.zeros(opened.shape.depth))
    program = build(opened.shape, hardware, data.marks if data else Marks(0, 0), dtype)
    layout = BatchLayout.of(
        program.mesh, batch_size, hardware.per_device_batch, "rank_teacher.batch_size"
    )
    identity = {
        "teacher": opened.digest,
        "dataset": data and data.digest,
        "method": method,
        "model": model and vars(model),
        "layer_choice": vars(layer_choice),
        "mask_training": mask_training.identity() if method == "learned" else None,
        "repeat_kv": kv == "repeat",
        "merge_kv": kv == "merge",
        "output_grams": output_grams,
        "calibration_batches": calibration_batches,
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
    }
    folder = claim_together(workdir, "rank-teacher", identity)
    if from_first((folder / ABOUT).exists):
        return Importance.open(workdir)
    calibration = Calibration(program, layout, data, folder, calibration_batches, seed)
    with jax.set_mesh(program.mesh):
        params = opened.params(program.param_shardings)
        measures = model is None or layer_choice.measures
        arrays = calibration.layers(params) if data and measures else {}
        layers = list(range(opened.shape.depth))
        if model and model.depth < len(layers):
            scores = layer_scores(arrays, layer_choice)
            layers = layer_choice.choose(len(layers), model.depth, scores)
            params = select_layers(params, layers)
        say(f"ranking by {method} on layers {layers}")
        if output_grams:
            calibration.grams(params, layers)
        cut = calibration.at(len(layers))
        arrays |= cut.structures(params, method)
        if method == "learned":
            arrays |= cut.learned(params, model, mask_training, kv)
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
    importance = Importance(about, arrays)
    with alone() as leads:
        if leads:
            report_of(importance).write(folder)
            importance.write(folder)
            for path in folder.glob("partial_*.npz"):
                path.unlink()
    say(f"importance {folder}\n  report       {folder / 'report.html'}")
    return importance


def check_method(method: str, model: ModelShape | None) -> None:
    """Checks what does not depend on the teacher."""
    check_one_of("rank_teacher.method", method, METHODS)
    if method == "learned" and model is None:
        raise UserError("rank_teacher.method = 'learned' needs the shape to cut: bind ModelShape.*")


def _check(
    opened: Checkpoint,
    data: TokenDataset | None,
    method: str,
    model: ModelShape | None,
    layer_choice: LayerChoice,
    output_grams: bool,
) -> None:
    """Refuses what the teacher or the dataset does not allow."""
    chooses = model and model.depth < opened.shape.depth and layer_choice.measures
    if data is None:
        if output_grams:
            raise UserError("rank_teacher.output_grams needs rank_teacher.dataset")
        if method not in WEIGHT_NORMS:
            raise UserError(
                f"rank_teacher.method = {method!r} needs rank_teacher.dataset; without one, "
                f"choose {' or '.join(WEIGHT_NORMS)}"
            )
        if chooses:
            raise UserError(
                "LayerChoice.rule = 'importance' needs rank_teacher.dataset; without one, choose "
                "'even' or 'listed'"
            )
        return
    if chooses and layer_choice.score != "influence" and not data.count("held_out"):
        raise UserError(
            f"LayerChoice.score = {layer_choice.score!r} needs held-out rows, dataset {data.path} "
            f"has none; choose 'influence', or a rule that measures nothing"
        )
    opened.check_rows(data)
