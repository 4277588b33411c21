"""What rank-teacher found out about a teacher, as it lies on disk.

A folder of rank-teacher holds

    importance.npz    float64 arrays, by name:
                      skip_1, skip_2, skip_3 [layers − window + 1]: rise of the held-out loss, in
                      nats per token, when the layers from this one on are skipped;
                      influence [layers], one less the cosine of a layer's input and output;
                      embed, kv_heads, heads, ffn, bottleneck [ranked layers, structures], and
                      embed_outside [width]: importance by `method`; a key-value head has that of
                      its query heads in it
                      square/attention_norm, square/ffn_norm [ranked layers, width] and
                      square/final_norm [width]: mean square of what the norms read
    gram_heads_N.npy, gram_ffn_N.npy
                      with `output_grams`, float32 [features, features] of each ranked layer N of
                      the teacher: mean product of every two of the features (heads × head_dim, or
                      neurons) that its output projection reads
    importance.json   what it is of: digests, method, ranked layers, settings; written last
    report.html       the same as pictures
"""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_arrays, write_arrays
from pangu_tiny.errors import UserError
from pangu_tiny.inherit.layers import WINDOWS, LayerChoice, window_scores
from pangu_tiny.inherit.structures import OUTSIDE, STRUCTURES
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.workdir import difference, digest_of, finished, read_json, write_atomically

ARRAYS, ABOUT = "importance.npz", "importance.json"

_FACTS = ("teacher", "layers", "method", "model", "repeat_kv", "merge_kv", "output_grams")


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """A ranking of a teacher: importance.json, and the arrays of importance.npz."""

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: str) -> "Importance":
        """Reads a workdir of rank-teacher."""
        about = finished("importance", folder, "rank-teacher", ABOUT)
        return cls(read_json(about, *_FACTS), read_arrays(about.parent / ARRAYS))

    def write(self, folder: epath.Path) -> None:
        write_arrays(folder / ARRAYS, self.arrays)
        write_atomically(folder / ABOUT, json.dumps(self.about, indent=1))

    @property
    def digest(self) -> str:
        """sha256 of what it was measured on, and how."""
        facts = {name: value for name, value in self.about.items() if name != "environment"}
        return digest_of(facts)

    def check_shape(self, model: ModelShape, kv: str) -> None:
        """Refuses another shape than learned masks were trained for."""
        trained = self.about["model"]
        if self.about["method"] != "learned":
            return
        merged = "merge" if self.about["merge_kv"] else "drop"
        learned = "repeat" if self.about["repeat_kv"] else merged
        if kv != learned:
            raise UserError(
                f"importance was learned with rank_teacher.kv = {learned!r}, inherit.kv is {kv!r}: "
                f"expected the same"
            )
        ignored = ("vocab_size", "tied", "series_terms", "norm_eps")
        there, here = (
            {name: value for name, value in shape.items() if name not in ignored}
            for shape in (trained, vars(model))
        )
        if there != here:
            raise UserError(
                f"importance was learned for another shape: {difference(there, here)}; "
                f"inherit.as_ranking = True cuts others by it all the same"
            )

    def structures(self, layers: list[int]) -> dict[str, np.ndarray]:
        """Scores by kind over these layers of the teacher: "embed" [width], others
        [len(layers), structures]."""
        places = self._places(layers)
        found = {
            kind: self.arrays[kind][places]
            for kind in STRUCTURES
            if kind != "embed" and kind in self.arrays
        }
        return {"embed": self.arrays["embed"][places].sum(axis=0) + self.arrays[OUTSIDE], **found}

    def squares(self, layers: list[int]) -> dict[str, np.ndarray] | None:
        """Mean square of every channel that a norm reads, by the name of its scale: [layers, width]
        or [width]; None where no dataset was given."""
        if "square/final_norm" not in self.arrays:
            return None
        places = self._places(layers)
        return {
            "blocks/attention_norm/scale": self.arrays["square/attention_norm"][places],
            "blocks/ffn_norm/scale": self.arrays["square/ffn_norm"][places],
            "final_norm/scale": self.arrays["square/final_norm"],
        }

    def has_grams(self, layers: list[int]) -> bool:
        """Whether Gram matrices lie beside it, of these layers of the teacher."""
        self._places(layers)
        return self.about["output_grams"]

    def _places(self, layers: list[int]) -> list[int]:
        ranked = {layer: place for place, layer in enumerate(self.about["layers"])}
        if unranked := [layer for layer in layers if layer not in ranked]:
            raise UserError(
                f"layers {unranked} are to stay, but importance was measured on the teacher cut to "
                f"{self.about['layers']}: choose these, or rank the teacher again"
            )
        return [ranked[layer] for layer in layers]


def layer_scores(arrays: dict[str, np.ndarray], choice: LayerChoice) -> np.ndarray | None:
    """[layers], what each layer of the teacher matters by `choice.score`, of the arrays of
    importance.npz; None where the choice needs none."""
    if not choice.measures:
        return None
    if choice.score not in arrays:
        raise UserError(
            f"LayerChoice.rule is 'importance', but {choice.score} was not measured; it needs "
            f"rank_teacher.dataset, with a held-out split, or choose LayerChoice.rule = 'even'"
        )
    if choice.score == "influence":
        return arrays["influence"]
    return window_scores(arrays[choice.score], WINDOWS[int(choice.score[-1]) - 1])
