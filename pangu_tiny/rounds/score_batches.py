"""The stage `score-batches`: the loss of everything that a round trained, under a frozen model."""

import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches
from pangu_tiny.data.round import UNITS, Round
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.program.feed import Feed, most_scored_at_once
from pangu_tiny.program.step import Objective, param_shardings, score_step
from pangu_tiny.progress import Progress
from pangu_tiny.rounds.forgetting import by_part, seen_losses, write_forgetting
from pangu_tiny.rounds.scores import SCORES, Scores
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import check_divides, make_mesh, named_sharding
from pangu_tiny.topology.processes import alone, from_first, led, say
from pangu_tiny.training.metrics import RowLosses, read_records, row_loss_files
from pangu_tiny.training.train import DTYPES
from pangu_tiny.workdir import claim_together


def score_batches(
    checkpoint: str,
    dataset: str,
    workdir: str,
    hardware: Hardware,
    unit: str = "batch",
    round_of: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    save_minutes: float = 1.0,
) -> Scores:
    """Scores every batch of a round, forward only, in the order and grouping of its training.

    Args:
      checkpoint: the model, a train workdir or a step in it.
      dataset: workdir of prepare-data; the one that the round was trained on.
      workdir: the folder to write.
      hardware: how the work is laid out; free.
      unit: "batch" for one loss a batch (the paper's), "sequence" for one a row, which differ more.
      round_of: train workdir, or a step in it, whose first round is scored; None is that of
        `checkpoint`. A model that is compared with needs it.
      batch_size: sequences taken at once, over all devices; None takes four times what training
        does, since nothing is kept for a backward pass.
      dtype: of matrix products and activations; None is that of the training.
      save_minutes: minutes between two saves, of which an interrupted run goes on from the last.

    Returns:
      What was found, as it lies in the workdir.

    Raises:
      UserError: of the arguments, of a checkpoint or dataset that do not fit, or a workdir of
        other scores.
    """
    check_scoring(unit, dtype)
    opened = open_checkpoint(checkpoint)
    trained = open_checkpoint(round_of) if round_of else opened
    round_ = first_round(trained)
    rows = TokenDataset.open(dataset)
    dtype = dtype or opened.about.get("dtype", "float32")
    if rows.digest != round_.dataset:
        raise UserError(
            f"dataset {rows.path} is {rows.digest[:12]}, the round was trained on "
            f"{round_.dataset[:12]}"
        )
    opened.check_rows(rows)
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    check_divides(opened.shape, mesh)
    feed = scoring_feed(mesh, hardware, batch_size)
    folder = claim_together(
        workdir,
        "score-batches",
        {
            "round": vars(round_),
            "unit": unit,
            "model": opened.digest,
            "dtype": dtype,
        },
    )
    if from_first(lambda: not (folder / SCORES).exists()):
        say(f"scoring {round_.batches:,} batches of {round_.global_batch} under {opened.path}")
        decoder = Decoder(
            opened.shape, DTYPES[dtype], hardware.attention, hardware.remat, hardware.unroll
        )
        objective = Objective(decoder, rows.begin_id, rows.end_id, hardware.loss_chunk)
        with jax.set_mesh(mesh):
            _score(opened, objective, rows, round_, feed, mesh, folder, 60 * save_minutes)
    with led() as leads:
        if leads and not (folder / SCORES).exists():
            found = _gather(folder, rows, round_, unit, opened.digest, dtype)
            seen = None
            if not trained.about["identity"].get("round_index"):  # else it saw other batches
                seen = seen_losses(trained.path.parent.parent, round_.batches)
            summary = write_forgetting(folder, by_part(found, seen))
            found.write(folder)
            say(f"scores {folder}\n{summary}\n  report     {folder / 'report.html'}")
    with alone() as leads:
        if leads and (folder / "row_losses").exists():
            (folder / "row_losses").rmtree()  # now that no process looks for them
    return Scores.open(workdir)


def first_round(checkpoint: Checkpoint) -> Round:
    """The first round of the run that made a checkpoint; of a later round, that from which its
    units were drawn.

    Raises:
      UserError: it was imported or cut, and not trained since.
    """
    identity = checkpoint.about["identity"]
    if "global_batch" not in identity:
        raise UserError(
            f"checkpoint {checkpoint.path} was not trained, and has no batches to score; "
            f"score_batches.round_of says whose are meant"
        )
    order = ("dataset", "seed", "mixture", "shuffle", "global_batch")
    try:
        if index := identity["round_index"]:
            return Round(**index["round"])
        return Round(**{name: identity[name] for name in order}, batches=checkpoint.about["step"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {checkpoint.path} does not say what it was trained on as this version of "
            f"pangu_tiny does: {error}"
        ) from error


def scoring_feed(mesh: Mesh, hardware: Hardware, batch_size: int | None) -> Feed:
    """Rows to score at once.

    Raises:
      UserError: they do not divide over the mesh.
    """
    if batch_size is None:
        batch_size = most_scored_at_once(mesh, hardware.per_device_batch)
    return Feed(mesh, batch_size, batch_size, "score_batches.batch_size")


def check_scoring(unit: str, dtype: str | None) -> None:
    """Refuses what no checkpoint makes right.

    Raises:
      UserError: names the setting.
    """
    if unit not in UNITS:
        raise UserError(f"score_batches.unit is {unit!r}, expected one of {', '.join(UNITS)}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"score_batches.dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")


def _score(
    opened: Checkpoint,
    objective: Objective,
    rows: TokenDataset,
    round_: Round,
    feed: Feed,
    mesh: Mesh,
    folder: epath.Path,
    save_seconds: float,
) -> None:
    """Leaves the losses of all rows of the round in the folder, as training leaves them, but with
    the place in the order as the step; what is there already is not scored again."""
    at_once = feed.rows_at_once
    total = round_.units("sequence")
    start = from_first(lambda: max((end for _, end in row_loss_files(folder)), default=0))
    if start == total:
        return
    score = score_step(objective, mesh)
    whole = jax.jit(lambda ids_b: ids_b, out_shardings=named_sharding(mesh, ()))
    params = opened.params(param_shardings(opened.shape, mesh))
    loader = batches(
        rows,
        "train",
        at_once,
        round_.seed,
        mixture=round_.mixture,
        shuffle=round_.shuffle,
        positions=feed.positions,
        start=start // at_once,
    )
    with alone() as leads:
        losses = RowLosses(folder, start) if leads else None
    saved_at = time.monotonic()
    pending: tuple[int, Any] | None = None

    def finish() -> None:
        """Reads the step before the one in flight."""
        if pending is None:
            return
        first, figures = pending
        row_ids, nats, targets = jax.device_get(figures)
        # The first rows may be there already, the last ones may lie beyond the round.
        new = slice(max(0, start - first), total - first)
        places = first + np.arange(len(row_ids))
        with alone() as leads:
            if leads:
                losses.add(places[new], row_ids[new], nats[new], targets[new])
        progress.update(len(row_ids[new]))

    def save(end: int) -> None:
        with alone() as leads:
            if leads:
                losses.flush(end)

    with Progress("score-batches", total, "row", initial=start, shown=leads) as progress:
        for first in range(start - start % at_once, total, at_once):
            batch = feed.place(next(loader), np.zeros(2, bool))
            found = score(params, batch.rows_abt[0])
            finish()
            pending = first, (whole(batch.row_ids_ab[0]), *found)
            if time.monotonic() - saved_at > save_seconds and first > start:
                save(first)
                saved_at = time.monotonic()
        finish()
        save(total)


def _gather(
    folder: epath.Path,
    rows: TokenDataset,
    round_: Round,
    unit: str,
    model: str,
    dtype: str,
) -> Scores:
    """Adds the losses of the rows up by unit; the same bits wherever it was interrupted."""
    units, size = round_.units(unit), round_.rows(unit)
    several = unit == "batch"
    nats = np.zeros(units, np.float64 if several else np.float32)
    targets = np.zeros(units, np.int64 if several else np.int32)
    sources = np.zeros(
        (units, len(rows.sources)) if several else units, np.int32 if several else np.int16
    )
    behind = 0
    for (start, end), path in row_loss_files(folder).items():
        records = read_records(path)
        if start != behind or len(records) != end - start:
            raise UserError(
                f"{path} holds {len(records)} losses from {start} on, expected {end - start} from"
                f" {behind} on; remove {path.parent} to score again"
            )
        behind = end
        unit_of = records["step"] // size
        source_of = rows.source_ids("train", records["row"])
        np.add.at(nats, unit_of, records["nats"])
        np.add.at(targets, unit_of, records["targets"])
        np.add.at(
            sources, (unit_of, source_of) if several else unit_of, 1 if several else source_of
        )
    return Scores(round_, unit, model, dtype, rows.sources, nats, targets, sources)
