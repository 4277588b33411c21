"""The rungs of the paper's ladder: each adds one of its formulas to the rung below.

In a recipe `ModelShape.*` is the model that the recipe makes, on the upper rungs. What differs on a
rung is bound with its name as a scope (`plain/ModelShape.depth = 3`), and what differs for the big
model that is inherited from with `teacher/`.
"""

from typing import NamedTuple


class Rung(NamedTuple):
    """What its models have.

    Attributes:
      adds: to the rung below.
      compact: the compact tokenizer, cut out of the big one.
      inherits: parameters of the teacher instead of random ones.
      again: more rounds than the first.
    """

    adds: str
    compact: bool = True
    inherits: bool = False
    again: bool = False


RUNGS = {
    "plain": Rung("wide and shallow, with the big vocabulary", compact=False),
    "tokenizer": Rung("compact tokenizer; deeper by the parameters that it saves"),
    "architecture": Rung("narrower and deeper"),
    "inheritance": Rung("parameters inherited from the teacher", inherits=True),
    "rounds": Rung("a second round on what was forgotten", inherits=True, again=True),
}
PROTOCOLS = {
    "equal": "every model is trained on equally many tokens, in all its rounds together",
    "paper": "equal bytes of text for both tokenizers; the second round comes on top",
}
SCOPES = ("teacher", *RUNGS)
