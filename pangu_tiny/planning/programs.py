"""The programs that can be planned: the very functions that the stages run, and what they take."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pangu_tiny import config
from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import UserError, check_one_of
from pangu_tiny.evaluation.decoding import advance, step_shapes
from pangu_tiny.evaluation.generate import generate
from pangu_tiny.evaluation.sampling import Sampling
from pangu_tiny.inherit.cut_list import check_fits
from pangu_tiny.inherit.masks import first_logits, mask_training_step
from pangu_tiny.inherit.measure import first_order, looking
from pangu_tiny.inherit.rank_teacher import check_method, rank_teacher
from pangu_tiny.model.kernels import splash_block
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.planning.kernels import Attention
from pangu_tiny.planning.memory import saved_bytes, shard_bytes
from pangu_tiny.program.batch import BatchLayout
from pangu_tiny.program.build import Program, build, build_training
from pangu_tiny.rounds.score_batches import score_batches, scoring_layout
from pangu_tiny.rounds.stages import settings
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import batch_shards, named_sharding
from pangu_tiny.topology.slices import Slice
from pangu_tiny.training.train import train

_MARKS = Marks(1, 2)  # no program depends on them but for constants
_STEPS = 1000  # where a gin file binds none: likewise


class Planned(NamedTuple):
    """A program on a mesh.

    Attributes:
      function: compiled by JAX.
      arguments: shapes and layouts of what it takes.
      settings: of those of its parameters that are no arrays.
      program: the model on its mesh.
      held: arrays that are there from step to step, by name.
      rows, accumulation: sequences that a chip takes at once, and how often in a step.
      tokens, flops: of a step, over all chips.
      backward: whether it has a backward pass.
    """

    function: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    mesh: Mesh
    program: Program
    held: dict[str, Any]
    rows: int
    accumulation: int
    tokens: int
    flops: int
    backward: bool

    @property
    def held_bytes(self) -> int:
        """Of one chip."""
        return shard_bytes(self.held)

    @property
    def sequences(self) -> int:
        """Of a step, over all chips."""
        return self.rows * self.accumulation * batch_shards(self.mesh)

    @property
    def activations(self) -> int:
        """Bytes that one chip keeps for the backward pass."""
        if not self.backward:
            return 0
        length = self.tokens // self.sequences
        tensor = self.mesh.shape["tensor"]
        return saved_bytes(self.program.objective, self.rows, length, tensor)

    def attention(self, where: Slice) -> Attention | None:
        """What the attention kernel of one chip does; None where there is no kernel, as with a
        cache."""
        if self.program.hardware.attention != "splash" or self.function is advance:
            return None
        shape, tensor = self.program.shape, self.mesh.shape["tensor"]
        length = self.tokens // self.sequences
        heads, kv_heads = shape.heads // tensor, shape.kv_heads // tensor
        size = (heads, kv_heads, length, shape.head_dim, splash_block(length))
        return Attention(where.topology, self.rows, *size)


class Asked(NamedTuple):
    """A program as it was asked for.

    Attributes:
      identity: JSON values that decide it.
      hardware: as it is bound.
      free: what of the hardware may be changed for it to fit: "per_device_batch", "mesh", "remat".
      build: lays it on devices.
      tokens: of a run; None where a run has no end of its own.
    """

    identity: dict[str, Any]
    hardware: Hardware
    free: tuple[str, ...]
    build: Callable[[Hardware, Sequence[Any]], Planned]
    tokens: float | None


def ask(program: str, sequence_length: int, tokens: float, teacher: str | None) -> Asked:
    """The program of a stage, by what is bound for it; see `plan`."""
    check_one_of("plan.program", program, PROGRAMS)
    if (teacher is not None) != (program == "rank"):
        raise UserError(
            f"plan.teacher is {teacher!r} and plan.program {program!r}, expected the gin file of a "
            "shape where the program is 'rank', and there alone"
        )
    if program == "rank":
        return _ask_rank(sequence_length, config.build(ModelShape, teacher))
    asked: Asked = PROGRAMS[program](sequence_length, tokens)
    return asked


def _ask_train(sequence_length: int, tokens: float) -> Asked:
    bound = _settings_of_train()

    def lay(hardware: Hardware, devices: Sequence[Any]) -> Planned:
        program = build(bound["model"], hardware, _MARKS, bound["dtype"], bound["z_loss"], devices)
        batch = bound["global_batch"] or hardware.per_device_batch * batch_shards(program.mesh)
        training = build_training(
            program, bound["optimizer"], bound["steps"], batch, sequence_length
        )
        arguments = (training.state, training.layout.abstract(sequence_length))
        held = {"parameters": training.state.params, "optimizer": training.state.optimizer}
        return _planned(training.step, arguments, program, held, training.layout, sequence_length)

    free = ("per_device_batch", "mesh", "remat")
    return Asked(_identity(bound), bound["hardware"], free, lay, tokens)


def _ask_score(sequence_length: int, tokens: float) -> Asked:
    trained = _settings_of_train()
    given = {"checkpoint": "", "dataset": "", "workdir": ""}
    bound = {**settings(score_batches, **given), "model": trained["model"]}
    bound["dtype"] = bound["dtype"] or trained["dtype"]

    def lay(hardware: Hardware, devices: Sequence[Any]) -> Planned:
        program = build(bound["model"], hardware, _MARKS, bound["dtype"], devices=devices)
        layout = scoring_layout(program.mesh, hardware, bound["batch_size"])
        arguments = (program.params, layout.abstract_rows(sequence_length))
        held = {"parameters": program.params}
        return _planned(program.score, arguments, program, held, layout, sequence_length, False)

    free = ("mesh",) if bound["batch_size"] else ("per_device_batch", "mesh")
    return Asked(_identity(bound), bound["hardware"], free, lay, tokens)


def _ask_rank(sequence_length: int, teacher: ModelShape) -> Asked:
    bound = settings(rank_teacher, teacher="", workdir="")
    model, method, training = bound["model"], bound["method"], bound["mask_training"]
    check_method(method, model)
    model = model or teacher
    check_fits(teacher, model, bound["kv"])
    steps = training.steps if method == "learned" else bound["calibration_batches"]
    backward = method in ("learned", "taylor")

    def lay(hardware: Hardware, devices: Sequence[Any]) -> Planned:
        program = build(teacher, hardware, _MARKS, bound["dtype"], devices=devices)
        layout = BatchLayout.of(
            program.mesh,
            bound["batch_size"],
            hardware.per_device_batch,
            "rank_teacher.batch_size",
        )
        if backward:
            program = program.resized(dataclasses.replace(teacher, depth=model.depth))
        params, rows_abt = program.params, layout.abstract(sequence_length).rows_abt
        held = {"parameters": params}
        function: Any
        arguments: tuple[Any, ...] = (params, rows_abt)
        if method == "learned":
            kv, seed = bound["kv"], bound["seed"]
            init, function, groups = mask_training_step(program, model, training, kv, seed)
            state = jax.eval_shape(init, first_logits(program.shape, groups, None))
            state = _laid(state, named_sharding(program.mesh, ()))
            arguments, held = (state, *arguments), held | {"optimizer": state}
        else:
            function = (first_order if backward else looking)(program.objective, program.mesh)
        return _planned(function, arguments, program, held, layout, sequence_length, backward)

    identity = _identity({**bound, "model": model})
    identity |= {"teacher": vars(teacher), "method": method, "kv": bound["kv"]}
    identity["batch"] = bound["batch_size"]
    tokens = steps * bound["batch_size"] * sequence_length
    free = ("per_device_batch", "mesh", "remat")
    return Asked(identity, bound["hardware"], free, lay, tokens)


def _ask_decode(sequence_length: int, tokens: float) -> Asked:
    trained = _settings_of_train()
    shape = trained["model"]
    bound = settings(generate, checkpoint="")
    drawing = {name: bound[name] for name in ("temperature", "top_k", "top_p")}

    def lay(hardware: Hardware, devices: Sequence[Any]) -> Planned:
        program = build(shape, hardware, _MARKS, bound["dtype"], devices=devices)
        mesh, decoder = program.mesh, program.objective.decoder
        rows = -(-bound["batch_size"] // batch_shards(mesh))
        batch = rows * batch_shards(mesh)
        arguments = step_shapes(decoder, mesh, batch, sequence_length)
        sampling = Sampling(**drawing)
        chosen = {"decoder": decoder, "vocab_size": shape.vocab_size, "sampling": sampling}
        held = {"parameters": arguments[0], "cache": arguments[2]}
        flops = batch * shape.flops_per_token(sequence_length) // 3
        return Planned(
            advance, arguments, chosen, mesh, program, held, rows, 1, batch, flops, False
        )

    identity = _identity({**bound, "model": shape}) | drawing
    return Asked(identity, bound["hardware"], ("mesh",), lay, None)


PROGRAMS: dict[str, Any] = {
    "train": _ask_train,
    "score": _ask_score,
    "rank": _ask_rank,
    "decode": _ask_decode,
}
"""train: a step of train. score: of score-batches. rank: a batch of rank-teacher by its method.
decode: a token of every sequence of a batch of generate."""


def _planned(
    function: Any,
    arguments: tuple[Any, ...],
    program: Program,
    held: dict[str, Any],
    layout: BatchLayout,
    sequence_length: int,
    backward: bool = True,
) -> Planned:
    rows = layout.rows_at_once // batch_shards(program.mesh)
    tokens = layout.rows * sequence_length
    flops = tokens * program.shape.flops_per_token(sequence_length)
    flops = flops if backward else flops // 3
    return Planned(
        function, arguments, {}, program.mesh, program, held, rows, layout.accumulation, tokens,
        flops, backward,
    )  # fmt: skip


def _settings_of_train() -> dict[str, Any]:
    """All parameters of train as they are bound, with or without a batch and a number of steps."""
    given: dict[str, Any] = {"dataset": "", "workdir": ""}
    for name, value in (("steps", _STEPS), ("global_batch", None)):
        if not config.is_bound(f"train.{name}"):
            given[name] = value
    return settings(train, **given)


def _identity(bound: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch": bound.get("global_batch") or bound.get("batch_size"),
        "dtype": bound["dtype"],
        "model": vars(bound["model"]),
        "hardware": vars(bound["hardware"]),
    }


def _laid(tree: Any, layout: Any) -> Any:
    """Shapes, all with one layout."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), tree
    )
