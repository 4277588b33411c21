"""The stage `train`: rows of token ids in, checkpoints out; stopped anywhere, it goes on."""

import dataclasses
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pangu_tiny.checkpoints.read import Checkpoint, describe, open_checkpoint
from pangu_tiny.checkpoints.run import Writer, with_moments
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import Drawn, batches, row_order
from pangu_tiny.data.round import Round
from pangu_tiny.data.round_index import RoundIndex
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.init import check_scheme
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import (
    Objective,
    abstract_state,
    init_state,
    score_step,
    train_step,
)
from pangu_tiny.topology import processes
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import check_divides, make_mesh
from pangu_tiny.topology.processes import anywhere, say
from pangu_tiny.training.held_out import score_held_out
from pangu_tiny.training.watch import Profile, Signals, Watch
from pangu_tiny.workdir import claim_together, environment, read_json, write_atomically

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Trained(NamedTuple):
    """Where a run stands: steps taken of steps asked for, its last checkpoint, and whether SIGTERM
    or ^C asked it to stop, be it behind the last step."""

    step: int
    steps: int
    checkpoint: str
    stopped: bool = False


def train(
    dataset: str,
    workdir: str,
    model: ModelShape,
    optimizer: Optimizer,
    hardware: Hardware,
    steps: int,
    global_batch: int,
    mixture: dict[str, float] | None = None,
    shuffle: bool = True,
    checkpoint: str | None = None,
    round_index: str | None = None,
    keep_moments: bool = False,
    schedule_start: int = 0,
    schedule_steps: int | None = None,
    init: str = "constant",
    dtype: str = "bfloat16",
    z_loss: float = 0.0,
    seed: int = 0,
    skip_nonfinite: bool = False,
    log_every: int = 10,
    evaluate_every: int = 1000,
    evaluate_rows: int | None = 8192,
    save_every: int = 1000,
    keep_every: int | None = None,
    drop_moments: bool = False,
    save_minutes: float = 15.0,
    tensorboard: bool = True,
    profile_steps: list[int] | None = None,
) -> Trained:
    """Trains a model, or goes on where a run in the same workdir stopped.

    Args:
      dataset: workdir of prepare-data.
      workdir: where checkpoints, metrics and the losses per row go.
      model: the shape to train.
      optimizer: AdamW and its schedule.
      hardware: how the work is laid out; may change from run to run.
      steps: optimizer steps in all.
      global_batch: sequences per step, over all devices.
      mixture: weight by source name; None takes every row once per epoch.
      shuffle: False takes rows as they are stored, of each source, and without a mixture one
        source behind the other.
      checkpoint: parameters to start from instead of random ones.
      round_index: workdir of select-batches; trains on what was drawn there instead of on the
        whole order. `steps`, `seed`, `mixture`, `shuffle` and `global_batch` have to be those of
        the draw, and `checkpoint`, if any, the model that was scored for it.
      keep_moments: start from the moments of Adam in `checkpoint` as well.
      schedule_start, schedule_steps: the first step of this run within the schedule of the
        learning rate, and the length of that schedule, where other runs share it; None is the end
        of this one.
      init: scheme of the random initialisation, see `model/init.py`.
      dtype: of matrix products and activations, "float32" or "bfloat16"; parameters and their
        gradients, norms, softmax and loss are float32.
      z_loss: weight of the squared log-normaliser.
      seed: of initialisation and order.
      skip_nonfinite: leave out the update of a step whose loss or gradient is not finite, and
        count it, instead of stopping.
      log_every, evaluate_every, save_every: steps between metrics, held-out losses, checkpoints.
        A last checkpoint and held-out loss are made at the end in any case.
      evaluate_rows: how many held-out rows are scored each time, the same ones, spread evenly over
        the split; None is all, as `evaluate` does it. Bits per byte are then an estimate, see
        `training/held_out.py`. Chosen so that at 1,024 rows a step it costs the work of 3 steps.
      keep_every: steps between checkpoints that stay for good, a multiple of `save_every`. Of all
        others the newest two are there; None keeps only these, so that a run takes no more room
        the longer it is.
      drop_moments: checkpoints that stay lose the moments of Adam, two thirds of their size, once
        they are not among the newest two. No run can go on from them, but a new one can start.
      save_minutes: minutes between checkpoints in any case.
      tensorboard: whether to write TensorBoard events.
      profile_steps: [first, last] step to write a JAX profile of, into workdir/profile.

    Returns:
      How far it came: `step` < `steps` after SIGTERM or ^C.

    Raises:
      UserError: a setting is wrong, the workdir holds another run, the dataset does not fit the
        model, the loss is not finite, or a checkpoint cannot be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"train.dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if steps < 1:
        raise UserError(f"train.steps is {steps}, expected at least 1")
    for name, value in (
        ("log_every", log_every),
        ("evaluate_every", evaluate_every),
        ("save_every", save_every),
    ):
        if value < 1:
            raise UserError(f"train.{name} is {value}, expected at least 1")
    if evaluate_rows is not None and evaluate_rows < 1:
        raise UserError(f"train.evaluate_rows is {evaluate_rows}, expected at least 1, or None")
    if keep_every is not None and (keep_every < 1 or keep_every % save_every):
        raise UserError(
            f"train.keep_every is {keep_every}, expected a multiple of train.save_every, "
            f"{save_every}"
        )
    if schedule_steps is None:
        schedule_steps = schedule_start + steps
    if schedule_start < 0:
        raise UserError(f"train.schedule_start is {schedule_start}, expected 0 or more")
    if schedule_start + steps > schedule_steps:
        raise UserError(
            f"train.schedule_start {schedule_start} and train.steps {steps} go beyond "
            f"train.schedule_steps {schedule_steps}"
        )
    check_scheme(init)
    decoder = Decoder(model, DTYPES[dtype], hardware.attention, hardware.remat, hardware.unroll)
    rows = TokenDataset.open(dataset)
    _check_dataset(rows, model)
    # For its complaints, before anything is written.
    row_order(rows, "train", seed, mixture, shuffle)
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    check_divides(model, mesh)
    feed = Feed(mesh, global_batch, hardware.per_device_batch)
    start_from = open_checkpoint(checkpoint) if checkpoint else None
    if start_from:
        _check_start(start_from, model, rows)
    if keep_moments and not (start_from and start_from.has_moments):
        raise UserError(
            "train.keep_moments = True needs a train.checkpoint that has moments, "
            + ("as training leaves them" if start_from else "found none")
        )
    index = RoundIndex.open(round_index) if round_index else None
    if index:
        here = Round(rows.digest, seed, mixture, shuffle, global_batch, index.round.batches)
        _check_index(index, round_index, here, steps, start_from)
    identity = {
        "model": dataclasses.asdict(model),
        "dataset": rows.digest,
        "tokenizer": rows.tokenizer_digest,
        "sequence_length": rows.sequence_length,
        "mixture": mixture,
        "shuffle": shuffle,
        "global_batch": global_batch,
        "steps": steps,
        "seed": seed,
        "optimizer": dataclasses.asdict(optimizer),
        "init": init,
        "dtype": dtype,
        "z_loss": z_loss,
        "skip_nonfinite": skip_nonfinite,
        "checkpoint": start_from and start_from.identity,
        "round_index": index and index.identity,
        "keep_moments": keep_moments,
        "schedule": [schedule_start, schedule_steps],
    }
    tokenizer_bytes = rows.tokenizer_bytes()
    profile = Profile(epath.Path(workdir), profile_steps)
    longer = f"to train on from its end, train.checkpoint = {workdir!r}, train.keep_moments = True"
    folder = claim_together(
        workdir, "train", identity, {"steps": f"{longer} and another train.workdir"}
    )
    _note_hardware(folder, hardware, mesh.size)
    objective = Objective(decoder, rows.begin_id, rows.end_id, hardware.loss_chunk, z_loss)
    schedule = optimizer.schedule(
        schedule_steps, global_batch * rows.sequence_length, schedule_start
    )
    transformation = optimizer.transformation(schedule)
    with jax.set_mesh(mesh):
        writer = Writer(folder / "checkpoints", keep_every, drop_moments)
        target = abstract_state(decoder, transformation, mesh)
        if restored := writer.restore_latest(target):
            state = restored[0]
        elif start_from:
            params = start_from.params(jax.tree.map(lambda leaf: leaf.sharding, target.params))
            state = init_state(decoder, transformation, init, seed, mesh, params)
            if keep_moments:
                state = with_moments(state, start_from.path, target)
        else:
            state = init_state(decoder, transformation, init, seed, mesh)
        start = int(state.step)
        run = Watch(
            folder=folder,
            rows=rows,
            steps=steps,
            tokens_per_step=global_batch * rows.sequence_length,
            flops_per_token=model.flops_per_token(rows.sequence_length),
            stop_nonfinite=not skip_nonfinite,
            log_every=log_every,
            start=start,
            tensorboard=tensorboard,
        )
        run.introduce(model, mesh, feed, optimizer)
        about = describe(
            model,
            identity=identity,
            dtype=dtype,
            begin_id=rows.begin_id,
            end_id=rows.end_id,
            sequence_length=rows.sequence_length,
            environment=environment(),
        )
        step_fn = train_step(objective, transformation, schedule, mesh, skip_nonfinite)
        score_fn = score_step(objective, mesh)
        loader = batches(
            rows,
            "train",
            global_batch,
            seed,
            mixture=mixture,
            shuffle=shuffle,
            positions=feed.positions,
            start=start,
            drawn=index and Drawn(index.units, index.rows),
        )

        def save(count: int) -> None:
            run.flush(count)
            facts = {**about, "step": count, "next_batch": count}
            writer.save(count, state, facts, tokenizer_bytes)

        def evaluate(count: int) -> None:
            began = time.monotonic()
            found = score_held_out(
                score_fn, state.params, rows, mesh, hardware.per_device_batch, evaluate_rows
            )
            if found.targets.any():
                run.log_held_out(count - 1, found, time.monotonic() - began)

        count, saved_at = start, time.monotonic()
        with Signals() as signals, profile, run:
            while count < steps and not run.stopping:
                profile.before(count, state)
                began = time.monotonic()
                local = next(loader)
                run.waited += time.monotonic() - began
                late = time.monotonic() - saved_at > 60 * save_minutes
                batch = feed.place(local, np.array([late, signals.received]))
                state, metrics = step_fn(state, batch)
                count += 1
                run.finish_last(writer)
                run.pending = (count - 1, metrics)
                evaluates = count % evaluate_every == 0 or count == steps
                saves = count % save_every == 0 or count == steps
                if evaluates or saves or run.saving or run.stopping:
                    run.finish_last(writer)
                if evaluates:
                    evaluate(count)
                if saves or run.saving or run.stopping:
                    save(count)
                    saved_at, run.saving = time.monotonic(), False
            writer.close()
            stopped = anywhere(signals.received)
    done = Trained(count, steps, str(folder / "checkpoints" / str(count)), stopped)
    if count < steps:
        say(f"stopped at step {count} of {steps}; run the same command again to go on")
    else:
        say(f"trained {steps} steps: {done.checkpoint}")
    return done


def _check_dataset(rows: TokenDataset, model: ModelShape) -> None:
    """Refuses a dataset whose ids do not fit the model, or whose row numbers do not fit int32."""
    if rows.vocab_size > model.vocab_size:
        raise UserError(
            f"dataset {rows.path} has token ids up to {rows.vocab_size - 1}, but "
            f"ModelShape.vocab_size is {model.vocab_size}"
        )
    if rows.rows("train") >= 2**31:
        raise UserError(
            f"dataset {rows.path} has {rows.rows('train'):,} rows, expected fewer than {2**31:,}; "
            f"a greater prepare_data.sequence_length makes fewer"
        )


def _check_start(start: Checkpoint, model: ModelShape, rows: TokenDataset) -> None:
    """Refuses to go on from a checkpoint of another shape or of other rows."""
    start.check_rows(rows)
    there, here = dataclasses.asdict(start.shape), dataclasses.asdict(model)
    differences = [
        f"ModelShape.{name} is {there[name]} there, {here[name]} here"
        for name in here
        if there[name] != here[name]
    ]
    if differences:
        raise UserError(f"checkpoint {start.path} does not fit: {'; '.join(differences)}")


def _check_index(
    index: RoundIndex, path: str, here: Round, steps: int, start: Checkpoint | None
) -> None:
    """Refuses a round index of another order or model, or one that `steps` do not go through."""
    if differences := index.round.differences(here):
        raise UserError(f"round index {path} was drawn from another round: {differences}")
    if steps != index.batches:
        raise UserError(
            f"train.steps is {steps}, round index {path} holds {index.batches} batches: expected "
            f"the same"
        )
    if start and index.model != start.digest:
        raise UserError(
            f"round index {path} follows the losses of model {index.model[:12]}, "
            f"train.checkpoint {start.path} is {start.digest[:12]}"
        )


def _note_hardware(folder: epath.Path, hardware: Hardware, devices: int) -> None:
    """Keeps how the run was laid out, and says what changed since it was last started."""
    path = folder / "hardware.json"
    now = {**dataclasses.asdict(hardware), "devices": devices, "processes": processes.count()}
    with processes.alone() as leads:
        if not leads:
            return
        before = now
        if path.exists():
            try:
                before = read_json(path)
            except UserError as error:  # it decides nothing, and is written anew
                say(str(error))
        for name in now:
            if before.get(name) != now[name]:
                say(f"since the last start, {name} changed: {before.get(name)} → {now[name]}")
        write_atomically(path, json.dumps(now, indent=2))
