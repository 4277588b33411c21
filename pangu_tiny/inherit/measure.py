"""What is measured on a teacher: compiled for a mesh, summed over batches, resumable.

Axes: a accumulation, b sequences taken at once over all devices, t position, l layer, f features
that an output projection reads.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pangu_tiny.arrays import read_arrays, write_arrays
from pangu_tiny.data.rows import read_marks
from pangu_tiny.inherit.layers import WINDOWS
from pangu_tiny.inherit.structures import OUTSIDE, apply_masks, sum_by_structure, with_groups
from pangu_tiny.program.step import Objective
from pangu_tiny.progress import Progress
from pangu_tiny.topology.compiler import compiler_options
from pangu_tiny.topology.mesh import AXES, named_sharding
from pangu_tiny.topology.processes import alone, first, from_first

Measure = Callable[[dict[str, Any], jax.Array], dict[str, Any]]
"""Parameters and rows [a, b, t + 1] to figures by name."""

Grams = dict[str, jax.Array]
"""By kind, "heads" and "ffn", float32 [l, f, f]."""


def total_over(
    batches: Callable[[int], Iterable[jax.Array]],
    count: int,
    measure: Callable[[jax.Array], dict[str, Any]],
    saved: epath.Path,
    label: str,
) -> dict[str, np.ndarray]:
    """Adds the figures of `count` batches up in float64; `batches` gives those from one on.

    They are kept in `saved` after every batch, so that an interrupted measurement resumes after
    the last one that it took.
    """
    totals = read_arrays(saved) if from_first(saved.exists) else {"batches": np.zeros(())}
    done = int(totals["batches"])
    with Progress(label, count, "batch", initial=done, shown=first()) as progress:
        for rows_abt in itertools.islice(batches(done), count - done):
            figures = {"batches": 1, **jax.device_get(measure(rows_abt))}
            for name, figure in figures.items():
                totals[name] = totals.get(name, 0.0) + np.asarray(figure, np.float64)
            with alone() as leads:
                if leads:
                    write_arrays(saved, totals)
            progress.update()
    return totals


def _compiled(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    whole, options = named_sharding(mesh, ()), compiler_options(mesh)
    return jax.jit(function, out_shardings=whole, compiler_options=options)


def skipping(objective: Objective, mesh: Mesh, depth: int) -> Measure:
    """Nats over the targets of some rows: `base`, and with adjacent layers skipped `skip_1`,
    `skip_2`, `skip_3` by the first of them; and `targets`."""

    def nats(params: dict[str, Any], mask_l: Any, rows_abt: jax.Array) -> tuple[Any, Any]:
        masked = apply_masks(params, {"layer": mask_l})

        def one(_: None, rows_bt: jax.Array) -> tuple[None, Any]:
            loss, marked = objective(masked, rows_bt)
            return None, (loss.rows_b, jnp.sum(marked.weights, axis=-1))

        _, (rows_ab, targets_ab) = jax.lax.scan(one, None, rows_abt)
        return rows_ab, targets_ab

    nats = _compiled(nats, mesh)

    def measure(params: dict[str, Any], rows_abt: jax.Array) -> dict[str, Any]:
        def total(gone: range) -> tuple[float, ...]:
            mask_l = np.ones(depth, np.float32)
            mask_l[list(gone)] = 0
            found = jax.device_get(nats(params, mask_l, rows_abt))
            return tuple(float(np.sum(part, dtype=np.float64)) for part in found)

        base, targets = total(range(0))
        rises = {
            f"skip_{window}": np.array(
                [total(range(first, first + window))[0] for first in range(depth - window + 1)]
            )
            for window in WINDOWS
            if window < depth
        }
        return {"base": base, "targets": targets, **rises}

    return measure


def looking(objective: Objective, mesh: Mesh) -> Measure:
    """The figures that the model records as it runs: activation sizes by structure, `influence` of
    the layers, mean squares of what the norms read."""

    def look(params: dict[str, Any], rows_bt: jax.Array) -> dict[str, Any]:
        measured = _recorded(objective, params, rows_bt, "measured")
        blocks = measured["blocks"]
        heads = blocks["attention"]["size"]
        shape = objective.decoder.shape
        figures = {
            "embed": blocks["attention_norm"]["size"] + blocks["ffn_norm"]["size"],
            OUTSIDE: measured["final_norm"]["size"],
            "kv_heads": jnp.zeros((shape.depth, shape.kv_heads)),
            "heads": heads,
            "ffn": blocks["ffn"]["size"],
        }
        if "shortcut" in blocks:
            figures["bottleneck"] = blocks["shortcut"]["size"]
        return {
            **with_groups(figures),
            "influence": blocks["influence"],
            "square/attention_norm": blocks["attention_norm"]["square"],
            "square/ffn_norm": blocks["ffn_norm"]["square"],
            "square/final_norm": measured["final_norm"]["square"],
        }

    def measure(params: dict[str, Any], rows_abt: jax.Array) -> dict[str, Any]:
        _, figures = jax.lax.scan(lambda _, rows_bt: (None, look(params, rows_bt)), None, rows_abt)
        return jax.tree.map(lambda figure: jnp.mean(figure, axis=0), figures)

    return _compiled(measure, mesh)


def _recorded(
    objective: Objective, params: dict[str, Any], rows_bt: jax.Array, collection: str
) -> Any:
    """The statistics that the model records in a collection as it runs."""
    marked = read_marks(rows_bt, objective.begin_id, objective.end_id)
    _, recorded = objective.decoder.apply(
        {"params": params}, marked.inputs, marked.segments, marked.positions, mutable=[collection]
    )
    return recorded[collection]


def grams(
    objective: Objective, mesh: Mesh
) -> tuple[Callable[[], Grams], Callable[[Grams, dict[str, Any], jax.Array], Grams]]:
    """Gram matrices of what the output projections read, all positions alike, as in `looking`.

    Returns:
      What makes totals of 0, and what adds to totals, which it consumes, the mean over the
      positions of rows [a, b, t + 1].
    """
    shape = objective.decoder.shape
    sizes = {"heads": shape.heads * shape.head_dim, "ffn": shape.ffn_width}
    layouts = {kind: _cut_by_rows(mesh, size) for kind, size in sizes.items()}

    def zeros() -> Grams:
        return {kind: jnp.zeros((shape.depth, size, size)) for kind, size in sizes.items()}

    def add(totals: Grams, params: dict[str, Any], rows_abt: jax.Array) -> Grams:
        def one(totals: Grams, rows_bt: jax.Array) -> tuple[Grams, None]:
            blocks = _recorded(objective, params, rows_bt, "grams")["blocks"]
            parts = {"heads": blocks["attention"]["gram"], "ffn": blocks["ffn"]["gram"]}
            return jax.tree.map(lambda x, y: x + y / len(rows_abt), totals, parts), None

        return jax.lax.scan(one, totals, rows_abt)[0]

    options = compiler_options(mesh)
    return (
        jax.jit(zeros, out_shardings=layouts),
        jax.jit(add, out_shardings=layouts, donate_argnums=0, compiler_options=options),
    )


def _cut_by_rows(mesh: Mesh, size: int) -> NamedSharding:
    """[l, f, f] over all devices where their number divides f, else over those of `tensor`."""
    return NamedSharding(mesh, PartitionSpec(None, "tensor" if size % mesh.size else AXES))


def mean_loss(objective: Objective, params: dict[str, Any], rows_abt: jax.Array) -> jax.Array:
    """Nats per target of a batch; to be differentiated, a part of it in memory at a time."""

    def one(total: jax.Array, rows_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, marked = objective(params, rows_bt)
        return total + loss.total, jnp.sum(marked.weights)

    total, targets_a = jax.lax.scan(jax.checkpoint(one), 0.0, rows_abt)
    return total / jnp.maximum(1.0, jnp.sum(targets_a))


def first_order(objective: Objective, mesh: Mesh) -> Measure:
    """Taylor: |w ⊙ ∂L/∂w| of the mean loss of a batch, added up over the weights of a structure,
    those that it reads with and those that it writes with (the paper's formula was not found:
    chosen as in the literature that it cites)."""

    def measure(params: dict[str, Any], rows_abt: jax.Array) -> dict[str, Any]:
        gradient = jax.grad(lambda params: mean_loss(objective, params, rows_abt))(params)
        products = jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradient)
        return with_groups(sum_by_structure(products))

    return _compiled(measure, mesh)


def magnitudes(vocab_size: int, power: int, mesh: Mesh) -> Callable[[dict[str, Any]], Any]:
    """L1 (power 1) or squared L2 (power 2) norm of the weights of a structure; of the vocabulary
    only the rows that are ids."""

    def measure(params: dict[str, Any]) -> dict[str, Any]:
        params = {**params, "embedding": {"table": params["embedding"]["table"][:vocab_size]}}
        if "head" in params:
            params["head"] = {"kernel": params["head"]["kernel"][:, :vocab_size]}
        sizes = jax.tree.map(lambda w: jnp.abs(w) ** power, params)
        return with_groups(sum_by_structure(sizes))

    return _compiled(measure, mesh)
