"""The stage `score-batches`: the loss of everything that a round trained, under a frozen model."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches
from pangu_tiny.data.order import UNITS, Round
from pangu_tiny.errors import UserError, check_one_of, failing_as
from pangu_tiny.program.batch import BatchLayout, most_scored_at_once
from pangu_tiny.program.build import DTYPES, Program, build
from pangu_tiny.program.feed import Feed
from pangu_tiny.progress import Progress
from pangu_tiny.rounds.forgetting import by_part, report_of, seen_losses
from pangu_tiny.rounds.scores import SCORES, Scores
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import named_sharding
from pangu_tiny.topology.processes import alone, from_first, led, say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.training.metrics import RowLosses, read_records, row_loss_files
from pangu_tiny.workdir import check_same


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
      save_minutes: minutes between two saves, from the last of which an interrupted run resumes.
    """
    check_scoring(unit, dtype)
    opened = open_checkpoint(checkpoint)
    trained = open_checkpoint(round_of) if round_of else opened
    round_ = first_round(trained)
    data = TokenDataset.open(dataset)
    dtype = dtype or opened.about.get("dtype", "float32")
    trained_on = "the round was trained on"
    check_same(f"dataset {data.path} is", data.digest, trained_on, round_.dataset)
    opened.check_rows(data)
    program = build(opened.shape, hardware, data.marks, dtype)
    layout = scoring_layout(program.mesh, hardware, batch_size)
    identity = {"round": vars(round_), "unit": unit, "model": opened.digest, "dtype": dtype}
    folder = claim_together(workdir, "score-batches", identity)
    if from_first(lambda: not (folder / SCORES).exists()):
        say(f"scoring {round_.batches:,} batches of {round_.global_batch} under {opened.path}")
        with jax.set_mesh(program.mesh):
            params = opened.params(program.param_shardings)
            _score(program, params, data, round_, Feed(layout), folder, 60 * save_minutes)
    with led() as leads:
        if leads and not (folder / SCORES).exists():
            nats, targets, sources = _add_up(folder, data, round_, unit)
            scores = Scores(
                round_, unit, opened.digest, dtype, data.sources, nats, targets, sources
            )
            seen = None
            if not trained.about["identity"].get("round_index"):  # else it saw other batches
                seen = seen_losses(trained.path.parent.parent, round_.batches)
            report = report_of(by_part(scores, seen))
            report.write(folder)
            scores.write(folder)
            say(f"scores {folder}\n{report.text()}\n  report       {folder / 'report.html'}")
    with alone() as leads:
        if leads and (folder / "row_losses").exists():
            (folder / "row_losses").rmtree()  # now that no process looks for them
    return Scores.open(workdir)


def first_round(checkpoint: Checkpoint) -> Round:
    """The first round of the run that made a checkpoint; of a later round, that from which its
    units were drawn."""
    identity = checkpoint.about["identity"]
    if "global_batch" not in identity:
        raise UserError(
            f"checkpoint {checkpoint.path} was not trained, and has no batches to score; "
            f"score_batches.round_of says whose are meant"
        )
    order = ("dataset", "seed", "mixture", "shuffle", "global_batch")
    unsaid = "does not say what it was trained on as this version of pangu_tiny does"
    with failing_as(f"checkpoint {checkpoint.path} {unsaid}", KeyError, TypeError):
        if index := identity["round_index"]:
            return Round(**index["round"])
        return Round(**{name: identity[name] for name in order}, batches=checkpoint.about["step"])


def scoring_layout(mesh: Mesh, hardware: Hardware, batch_size: int | None) -> BatchLayout:
    """Rows to score at once."""
    if batch_size is None:
        batch_size = most_scored_at_once(mesh, hardware.per_device_batch)
    return BatchLayout.of(mesh, batch_size, batch_size, "score_batches.batch_size")


def check_scoring(unit: str, dtype: str | None) -> None:
    """Checks the options that do not depend on the checkpoint."""
    check_one_of("score_batches.unit", unit, UNITS)
    check_one_of("score_batches.dtype", dtype, (None, *DTYPES))


def _score(
    program: Program,
    params: dict[str, Any],
    data: TokenDataset,
    round_: Round,
    feed: Feed,
    folder: epath.Path,
    save_seconds: float,
) -> None:
    """Leaves the losses of all rows of the round in the folder, as training leaves them, but with
    the place in the order as the step; what is there already is not scored again."""
    at_once = feed.layout.rows
    total = round_.units("sequence")
    start = from_first(lambda: max((end for _, end in row_loss_files(folder)), default=0))
    if start == total:
        return
    whole = jax.jit(lambda ids_b: ids_b, out_shardings=named_sharding(program.mesh, ()))
    loader = batches(
        data,
        "train",
        at_once,
        round_.order,
        positions=feed.positions,
        start=start // at_once,
    )
    with alone() as leads:
        losses = RowLosses(folder, start) if leads else None

    def scored() -> Iterator[tuple[int, Any]]:
        """First place and figures of each batch, given out when the batch after it was started."""
        in_flight: list[tuple[int, Any]] = []
        for first in range(start - start % at_once, total, at_once):
            batch = feed.place(next(loader))
            nats_and_targets = program.score(params, batch.rows_abt[0])
            yield from in_flight
            in_flight = [(first, (whole(batch.row_ids_ab[0]), *nats_and_targets))]
        yield from in_flight

    saved_at = time.monotonic()
    with Progress("score-batches", total, "row", initial=start, shown=leads) as progress:
        for first, figures in scored():
            row_ids, nats, targets = jax.device_get(figures)
            # The first rows may be there already, the last ones may lie beyond the round.
            end = min(first + at_once, total)
            new = slice(max(0, start - first), end - first)
            places = first + np.arange(len(row_ids))
            late = end == total or time.monotonic() - saved_at > save_seconds
            with alone() as leads:
                if leads:
                    losses.add(places[new], row_ids[new], nats[new], targets[new])
                    if late:
                        losses.flush(end)
                        saved_at = time.monotonic()
            progress.update(len(row_ids[new]))


def _add_up(
    folder: epath.Path, data: TokenDataset, round_: Round, unit: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats, targets and sources of every unit, as `Scores` has them, from the losses of the rows;
    the same bits wherever it was interrupted."""
    units, size = round_.units(unit), round_.rows(unit)
    several = unit == "batch"
    nats = np.zeros(units, np.float64 if several else np.float32)
    targets = np.zeros(units, np.int64 if several else np.int32)
    sources = np.zeros(
        (units, len(data.sources)) if several else units, np.int32 if several else np.int16
    )
    done = 0
    for (start, end), path in row_loss_files(folder).items():
        records = read_records(path)
        if start != done or len(records) != end - start:
            raise UserError(
                f"{path} holds {len(records)} losses from {start} on, expected {end - start} from"
                f" {done} on; remove {path.parent} to score again"
            )
        done = end
        unit_of = records["step"] // size
        source_of = data.source_ids("train", records["row"])
        np.add.at(nats, unit_of, records["nats"])
        np.add.at(targets, unit_of, records["targets"])
        np.add.at(
            sources, (unit_of, source_of) if several else unit_of, 1 if several else source_of
        )
    return nats, targets, sources
