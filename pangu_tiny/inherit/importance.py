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
import hashlib
import json
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_arrays, write_arrays
from pangu_tiny.errors import UserError
from pangu_tiny.inherit.layers import WINDOWS, LayerChoice, window_scores
from pangu_tiny.inherit.structures import OUTSIDE, STRUCTURES
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.workdir import read_json, write_atomically

ARRAYS, ABOUT = "importance.npz", "importance.json"

_FACTS = ("teacher", "layers", "method", "model", "repeat_kv", "merge_kv", "output_grams")


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """A ranking of a teacher.

    Attributes:
      about: importance.json.
      arrays: importance.npz.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: str) -> "Importance":
        """Reads a workdir of rank-teacher.

        Raises:
          UserError: it is none, or was not finished.
        """
        place = epath.Path(folder)
        if not (place / ABOUT).exists():
            raise UserError(
                f"importance {folder} has no {ABOUT}; expected a folder that rank-teacher finished"
            )
        return cls(read_json(place / ABOUT, *_FACTS), read_arrays(place / ARRAYS))

    def write(self, folder: epath.Path) -> None:
        write_arrays(folder / ARRAYS, self.arrays)
        write_atomically(folder / ABOUT, json.dumps(self.about, indent=1))

    @property
    def digest(self) -> str:
        """sha256 of what it was measured on, and how."""
        facts = {name: value for name, value in self.about.items() if name != "environment"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def check_shape(self, model: ModelShape, repeat_kv: bool, merge_kv: bool) -> None:
        """Refuses another shape than learned masks were trained for.

        Raises:
          UserError: names both.
        """
        trained = self.about["model"]
        if self.about["method"] != "learned":
            return
        for name, value in (("repeat_kv", repeat_kv), ("merge_kv", merge_kv)):
            if self.about[name] != value:
                raise UserError(
                    f"importance was learned with rank_teacher.{name} = {self.about[name]}, "
                    f"inherit.{name} is {value}: expected the same"
                )
        ignored = ("vocab_size", "tied", "series_terms", "norm_eps")
        differences = [
            f"{name} {trained[name]} there, {value} here"
            for name, value in vars(model).items()
            if trained[name] != value and name not in ignored
        ]
        if differences:
            raise UserError(
                f"importance was learned for another shape: {'; '.join(differences)}; "
                f"inherit.as_ranking = True cuts others by it all the same"
            )

    def structures(self, layers: list[int]) -> dict[str, np.ndarray]:
        """Scores by kind over these layers of the teacher: "embed" [width], others
        [len(layers), structures].

        Raises:
          UserError: one of them was not ranked.
        """
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
        """Whether Gram matrices lie beside it, of these layers of the teacher.

        Raises:
          UserError: one of them was not ranked.
        """
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
    """[layers], what each layer of the teacher matters by `choice.score`; None where the choice
    needs none.

    Args:
      arrays: as in importance.npz.

    Raises:
      UserError: it was not measured.
    """
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
