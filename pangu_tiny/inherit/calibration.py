"""A teacher on a mesh, and the batches that it is measured on.

Every measurement is kept in the folder while it is under way, so that it can be resumed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from pangu_tiny.arrays import read_arrays, write_array, write_arrays
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches, held_out_batches
from pangu_tiny.data.order import Order
from pangu_tiny.inherit import masks, measure
from pangu_tiny.inherit.correction import gram_file
from pangu_tiny.inherit.layers import WINDOWS
from pangu_tiny.inherit.masks import MaskState, MaskTraining
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.batch import BatchLayout
from pangu_tiny.program.build import Program
from pangu_tiny.program.feed import Feed
from pangu_tiny.progress import Progress
from pangu_tiny.topology.mesh import named_sharding
from pangu_tiny.topology.processes import alone, first, from_first

WEIGHT_NORMS = ("l1", "l2")
"""Methods that need no data."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measures a teacher.

    Attributes:
      data: what it is measured on; None allows only `WEIGHT_NORMS`.
      folder: where measurements lie while they are under way.
      count: batches, of each split; what is held out may be less.
      seed: of the order of the data, and of the noise of learned masks.
    """

    program: Program
    layout: BatchLayout
    data: TokenDataset | None
    folder: epath.Path
    count: int
    seed: int

    def at(self, depth: int) -> "Calibration":
        """The same for a teacher of which `depth` layers are left."""
        shape = dataclasses.replace(self.program.shape, depth=depth)
        return dataclasses.replace(self, program=self.program.resized(shape))

    def layers(self, params: dict[str, Any]) -> dict[str, np.ndarray]:
        """Rises of the held-out loss with layers skipped, and the influence of each layer."""
        program, arrays = self.program, {}
        if held_out := self.data.count("held_out"):
            count = min(self.count, -(-held_out // self.layout.rows))
            skip = measure.skipping(program.objective, program.mesh, program.shape.depth)
            totals = self._total("layers", "layers skipped", self._held_out, count, params, skip)
            for window in WINDOWS:
                if (name := f"skip_{window}") in totals:
                    arrays[name] = (totals[name] - totals["base"]) / totals["targets"]
        look = measure.looking(program.objective, program.mesh)
        totals = self._total("influence", "influence", self._train, self.count, params, look)
        return {**arrays, "influence": totals["influence"] / totals["batches"]}

    def grams(self, params: dict[str, Any], layers: list[int]) -> None:
        """Writes the Gram matrices of a teacher that has these layers alone, if they are not there.

        Nothing is saved on the way: totals are as large as a model, and all that is done again
        after an interruption are forward passes.
        """
        files = [gram_file(self.folder, kind, n) for kind in ("heads", "ffn") for n in layers]
        if from_first(lambda: all(file.exists() for file in files)):
            return
        program = self.at(len(layers)).program
        zeros, add = measure.grams(program.objective, program.mesh)
        totals = zeros()
        with Progress("output grams", self.count, "batch", shown=first()) as progress:
            for rows_abt in itertools.islice(self._train(), self.count):
                totals = jax.block_until_ready(add(totals, params, rows_abt))
                progress.update()
        one = jax.jit(lambda lff, n: lff[n], out_shardings=named_sharding(program.mesh, ()))
        for kind, total_lff in totals.items():
            for place, layer in enumerate(layers):
                gram_ff = np.asarray(one(total_lff, place)) / np.float32(self.count)
                with alone() as leads:
                    if leads:
                        write_array(gram_file(self.folder, kind, layer), gram_ff)

    def structures(self, params: dict[str, Any], method: str) -> dict[str, np.ndarray]:
        """Importance of all but layers by a method; by "learned" masks, what the norms read
        alone."""
        program, scores = self.program, {}
        if method in WEIGHT_NORMS:
            power = WEIGHT_NORMS.index(method) + 1
            sums = measure.magnitudes(program.shape.vocab_size, power, program.mesh)(params)
            scores = {name: np.asarray(x, np.float64) for name, x in jax.device_get(sums).items()}
        if self.data is None:
            return scores
        means = self._mean("activation", params, measure.looking(program.objective, program.mesh))
        squares = {name: x for name, x in means.items() if name.startswith("square/")}
        if method == "activation":
            scores = {name: x for name, x in means.items() if name not in squares}
            del scores["influence"]  # of the whole teacher it was measured before
        elif method == "taylor":
            scores = self._taylor(params)
        elif method not in ("learned", *WEIGHT_NORMS):
            raise ValueError(f"no measure for method {method!r}")
        return {**squares, **scores}

    def learned(
        self, params: dict[str, Any], model: ModelShape, training: MaskTraining, kv: str
    ) -> dict[str, np.ndarray]:
        """Importance of all but layers by masks that are trained for a smaller model."""
        program = self.program
        scores = None
        if training.start == "taylor":
            taylor = self._taylor(params)
            scores = {**taylor, "embed": taylor["embed"].sum(axis=0) + taylor["embed_outside"]}
        init, step, groups = masks.mask_training_step(program, model, training, kv, self.seed)
        saved = self.folder / "partial_masks.npz"
        state = init(masks.first_logits(program.shape, groups, scores))
        if from_first(saved.exists):
            state = _restore(read_arrays(saved), state)
        start = int(state.step)
        in_flight: jax.Array | None = None
        progress = Progress("learned masks", training.steps, "step", start, shown=first())

        def settle() -> None:
            """Reads the loss of the step before the one in flight."""
            if in_flight is not None:
                progress.update(loss=f"{float(in_flight):.3f}")

        with progress:
            left = itertools.islice(self._train(start), training.steps - start)
            for done, rows_abt in enumerate(left, start + 1):
                state, loss = step(state, params, rows_abt)
                settle()
                in_flight = loss
                with alone() as leads:
                    if leads and done % training.save_every == 0:
                        write_arrays(saved, _arrays(state))
            settle()
        return masks.final_scores(jax.device_get(state.logits))

    def _taylor(self, params: dict[str, Any]) -> dict[str, np.ndarray]:
        program = self.program
        return self._mean("taylor", params, measure.first_order(program.objective, program.mesh))

    def _train(self, start: int = 0) -> Iterator[jax.Array]:
        feed, order = Feed(self.layout), Order(self.seed)
        rows = self.layout.rows
        local = batches(self.data, "train", rows, order, positions=feed.positions, start=start)
        return (feed.place(batch).rows_abt for batch in local)

    def _held_out(self, start: int) -> Iterator[jax.Array]:
        feed = Feed(self.layout)
        local = held_out_batches(self.data, self.layout.rows, feed.positions)
        whole = (feed.place(batch).rows_abt for batch in local)
        return itertools.islice(whole, start, None)

    def _mean(
        self, name: str, params: dict[str, Any], figures: measure.Measure
    ) -> dict[str, np.ndarray]:
        totals = self._total(name, name, self._train, self.count, params, figures)
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
        saved = self.folder / f"partial_{name}.npz"
        return measure.total_over(rows, count, lambda x: figures(params, x), saved, label)


def _arrays(state: MaskState) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _restore(arrays: dict[str, np.ndarray], state: MaskState) -> MaskState:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(arrays[jax.tree_util.keystr(path)], leaf.sharding), state
    )
