"""The stage `train`: rows of token ids in, checkpoints out; stopped anywhere, it resumes."""

import dataclasses
import json
import time
from typing import Any, NamedTuple

import jax
from etils import epath

from pangu_tiny.checkpoints.read import Checkpoint, describe, open_checkpoint
from pangu_tiny.checkpoints.run import Writer, with_moments
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import Drawn, batches
from pangu_tiny.data.order import Round
from pangu_tiny.data.round_index import RoundIndex
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.model.init import SCHEMES
from pangu_tiny.model.layout import thin_shards
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.build import DTYPES, Program, Training, build, build_training
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.optimizer import OWN_SCHEDULE, Optimizer, SharedSchedule
from pangu_tiny.program.step import TrainState, init_state
from pangu_tiny.topology import processes
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.training.held_out import score_held_out
from pangu_tiny.training.loop import Run, train_steps
from pangu_tiny.training.metrics import MFU_FORMULA, peak_flops
from pangu_tiny.training.watch import WATCHING, Profile, Watch, Watching
from pangu_tiny.workdir import check_same, difference, read_json, write_atomically


class Trained(NamedTuple):
    """Where a run stands: steps taken of steps asked for, its last checkpoint, and whether SIGTERM
    or ^C asked it to stop, even after the last step."""

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
    init: str = "constant",
    dtype: str = "bfloat16",
    z_loss: float = 0.0,
    seed: int = 0,
    evaluate_every: int = 1000,
    save_every: int = 1000,
    watching: Watching = WATCHING,
    shared_schedule: SharedSchedule = OWN_SCHEDULE,
) -> Trained:
    """Trains a model, or resumes a run that was stopped in the same workdir.

    Args:
      dataset: workdir of prepare-data.
      workdir: where checkpoints, metrics and the losses of rows go.
      model: the shape to train.
      optimizer: AdamW and its schedule.
      hardware: how the work is laid out; may change from run to run.
      steps: optimizer steps in all.
      global_batch: sequences per step, over all devices.
      mixture: weight by source name; None takes every row once per epoch.
      shuffle: False takes rows as they are stored, of each source, and without a mixture one
        source after the other.
      checkpoint: parameters to start from instead of random ones.
      round_index: workdir of select-batches; trains on what was drawn there instead of on the
        whole order. `steps`, `seed`, `mixture`, `shuffle` and `global_batch` have to be those of
        the draw, and `checkpoint`, if any, the model that was scored for it.
      keep_moments: start from the moments of Adam in `checkpoint` as well.
      init: scheme of the random initialisation, see `model/init.py`.
      dtype: of matrix products and activations, "float32" or "bfloat16"; parameters and their
        gradients, norms, softmax and loss are float32.
      z_loss: weight of the squared log-normaliser.
      seed: of initialisation and order.
      evaluate_every, save_every: steps between held-out losses, checkpoints. A last one of each is
        made at the end in any case.
      watching: what else is written down, and when.
      shared_schedule: where other runs share the schedule of the learning rate.

    Returns:
      How far it came: `step` < `steps` after SIGTERM or ^C.
    """
    check_one_of("train.dtype", dtype, DTYPES)
    check_one_of("train.init", init, SCHEMES)
    check_number("train.steps", steps, 1)
    check_number("train.evaluate_every", evaluate_every, 1)
    check_number("train.save_every", save_every, 1)
    if watching.keep_every and watching.keep_every % save_every:
        raise UserError(
            f"Watching.keep_every is {watching.keep_every}, expected a multiple of "
            f"train.save_every, {save_every}"
        )
    data = TokenDataset.open(dataset)
    _check_dataset(data, model)
    length = data.sequence_length
    program = build(model, hardware, data.marks, dtype, z_loss)
    training = build_training(program, optimizer, steps, global_batch, length, shared_schedule)
    opened = open_checkpoint(checkpoint) if checkpoint else None
    start = Start(opened, keep_moments, init, seed)
    start.check(model, data)
    round_ = Round(data.digest, seed, mixture, shuffle, global_batch, steps)
    round_.order.rows(data, "train")  # for its complaints, before anything is written
    index = RoundIndex.open(round_index) if round_index else None
    if index:
        _check_index(index, round_index, round_, start.checkpoint)
    identity = {
        "model": dataclasses.asdict(model),
        "dataset": data.digest,
        "tokenizer": data.tokenizer_digest,
        "sequence_length": length,
        "mixture": mixture,
        "shuffle": shuffle,
        "global_batch": global_batch,
        "steps": steps,
        "seed": seed,
        "optimizer": optimizer.identity(),
        "init": init,
        "dtype": dtype,
        "z_loss": z_loss,
        "skip_nonfinite": optimizer.skip_nonfinite,
        "checkpoint": start.checkpoint and start.checkpoint.identity,
        "round_index": index and index.identity,
        "keep_moments": keep_moments,
        "schedule": list(shared_schedule.within(steps)),
    }
    longer = f"to train on from its end, train.checkpoint = {workdir!r}, train.keep_moments = True"
    advice = {"steps": f"{longer} and another train.workdir"}
    folder = claim_together(workdir, "train", identity, advice)
    _note_hardware(folder, hardware, program.mesh.size)
    _introduce(program, training, optimizer, length)
    drawn = Drawn(index.units, index.rows) if index else None
    loop = {"steps": steps, "evaluate_every": evaluate_every, "save_every": save_every}
    with jax.set_mesh(program.mesh):
        count, stopped = _run(
            folder, data, program, training, start, round_, drawn, identity, watching, loop
        )
    done = Trained(count, steps, str(folder / "checkpoints" / str(count)), stopped)
    if count < steps:
        say(f"stopped at step {count} of {steps}; run the same command again to resume")
    else:
        say(f"trained {steps} steps: {done.checkpoint}")
    return done


class Start(NamedTuple):
    """What a run starts from: the parameters of a checkpoint, and its moments of Adam or fresh
    ones; or random parameters, by a scheme."""

    checkpoint: Checkpoint | None
    keep_moments: bool
    scheme: str
    seed: int

    def check(self, model: ModelShape, data: TokenDataset) -> None:
        """Refuses a checkpoint of another shape or of other rows."""
        start = self.checkpoint
        if start:
            start.check_rows(data)
            there, here = dataclasses.asdict(start.shape), dataclasses.asdict(model)
            if there != here:
                raise UserError(
                    f"checkpoint {start.path} does not fit: "
                    f"{difference({'ModelShape': there}, {'ModelShape': here})}"
                )
        if self.keep_moments and not (start and start.has_moments):
            raise UserError(
                "train.keep_moments = True needs a train.checkpoint that has moments, "
                + ("as training leaves them" if start else "found none")
            )

    def state(self, program: Program, training: Training) -> TrainState:
        """The state before the first step."""
        params = self.checkpoint and self.checkpoint.params(program.param_shardings)
        decoder, mesh = program.objective.decoder, program.mesh
        state = init_state(decoder, training.optimizer, self.scheme, self.seed, mesh, params)
        if self.keep_moments:
            return with_moments(state, self.checkpoint.path, training.state)
        return state


def _run(
    folder: epath.Path,
    data: TokenDataset,
    program: Program,
    training: Training,
    start: Start,
    round_: Round,
    drawn: Drawn | None,
    identity: dict[str, Any],
    watching: Watching,
    loop: dict[str, int],
) -> tuple[int, bool]:
    """Trains from the newest checkpoint in the folder, or from the start; see `train_steps`."""
    writer = Writer(folder / "checkpoints", watching.keep_every, watching.drop_moments)
    restored = writer.restore_latest(training.state)
    state = restored[0] if restored else start.state(program, training)
    say(writer.room(loop["steps"], state))
    feed = Feed(training.layout)
    watch = Watch(
        folder,
        data,
        writer,
        watching,
        steps=loop["steps"],
        start=int(state.step),
        tokens=training.layout.rows * data.sequence_length,
        flops=program.shape.flops_per_token(data.sequence_length),
        stop_nonfinite=not identity["skip_nonfinite"],
    )
    about = describe(
        program.shape,
        identity=identity,
        dtype=identity["dtype"],
        begin_id=data.begin_id,
        end_id=data.end_id,
        sequence_length=data.sequence_length,
    )
    tokenizer_bytes = data.tokenizer_bytes()

    def save(state: TrainState, count: int) -> None:
        watch.rest()
        watch.flush(count)
        writer.save(count, state, {**about, "step": count, "next_batch": count}, tokenizer_bytes)
        watch.alive()

    def evaluate(state: TrainState, count: int) -> None:
        began = time.monotonic()
        scored = score_held_out(program, state.params, data, watching.evaluate_rows, watch.alive)
        if scored.targets.any():
            watch.log_held_out(count - 1, scored, time.monotonic() - began)

    rows = batches(
        data,
        "train",
        training.layout.rows,
        round_.order,
        positions=feed.positions,
        start=int(state.step),
        drawn=drawn,
    )
    profile = Profile(folder, watching.profile_steps)
    run = Run(training.step, feed, rows, evaluate, save, writer.close, watch, profile)
    return train_steps(run, state, **loop, save_minutes=watching.save_minutes)


def _introduce(
    program: Program, training: Training, optimizer: Optimizer, sequence_length: int
) -> None:
    """Tells what is about to be trained."""
    shape, layout, mesh = program.shape, training.layout, program.mesh
    flops, tokens = shape.flops_per_token(sequence_length), layout.rows * sequence_length
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    say(
        f"{shape.parameters / 1e6:.1f}M parameters, {flops / 1e9:.3f} GFLOP/token, "
        f"peak rate {optimizer.peak_rate(tokens):.3g}"
    )
    say(
        f"mesh {sizes} on {mesh.size} × {jax.devices()[0].device_kind}; "
        f"{tokens} tokens a step, accumulated {layout.accumulation} times"
    )
    if mesh.devices.flat[0].platform == "tpu":
        for line in thin_shards(shape, mesh):
            say(f"WARNING: {line}")
    if peak_flops():
        say(MFU_FORMULA)


def _check_dataset(data: TokenDataset, model: ModelShape) -> None:
    """Refuses a dataset whose ids do not fit the model, or whose row numbers do not fit int32."""
    if data.vocab_size > model.vocab_size:
        raise UserError(
            f"dataset {data.path} has token ids up to {data.vocab_size - 1}, but "
            f"ModelShape.vocab_size is {model.vocab_size}"
        )
    if (rows := data.count("train")) >= 2**31:
        raise UserError(
            f"dataset {data.path} has {rows:,} rows, expected fewer than {2**31:,}; "
            f"a greater prepare_data.sequence_length makes fewer"
        )


def _check_index(index: RoundIndex, path: str, here: Round, start: Checkpoint | None) -> None:
    """Refuses a round index of another order or model, or of another number of batches than the
    run `here` has steps."""
    steps = here.batches
    if differences := index.round.differences(
        dataclasses.replace(here, batches=index.round.batches)
    ):
        raise UserError(f"round index {path} was drawn from another round: {differences}")
    if steps != index.batches:
        raise UserError(
            f"train.steps is {steps}, round index {path} holds {index.batches} batches: expected "
            f"the same"
        )
    if start:
        follows = f"round index {path} follows the losses of model"
        check_same(follows, index.model, f"train.checkpoint {start.path} is", start.digest)


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
