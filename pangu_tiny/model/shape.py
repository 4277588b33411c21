"""ModelShape: every size that defines a model, and the counts that follow from it."""

import dataclasses
import math

from pangu_tiny.errors import UserError, check_number

VOCAB_MULTIPLE = 128
"""Vocabulary rows are padded to this multiple: one shape on every mesh and in every checkpoint."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder; two models with equal shapes have interchangeable checkpoints.

    Attributes:
      depth: number of blocks.
      width: size of the residual stream.
      heads: number of query heads.
      ffn_width: inner size of the feed-forward part.
      vocab_size: number of token ids that can occur; tables are padded, see `padded_vocab`.
      kv_heads: number of key-value heads (grouped-query attention); 0 means as many as `heads`.
      head_dim: size of one head; 0 means width / heads.
      tied: whether the head is the transposed embedding table.
      rope_theta: base of the rotary frequencies.
      norm_eps: ε inside the square root of RMSNorm.
      series_terms: n of the series activation (P2 eq. 7); 1 is plain SwiGLU, the paper uses 2.
      shortcut_ratio: r of the augmented shortcut, whose bottleneck is width / r (P2 section on
        the cheaper branch); 0 is none, the paper uses 32.
    """

    depth: int
    width: int
    heads: int
    ffn_width: int
    vocab_size: int
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    series_terms: int = 1
    shortcut_ratio: int = 0

    def __post_init__(self):
        for name in ("depth", "width", "heads", "ffn_width", "vocab_size", "series_terms"):
            check_number(f"ModelShape.{name}", getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps"):
            check_number(f"ModelShape.{name}", getattr(self, name), above=0, below=math.inf)
        if not self.head_dim:
            if self.width % self.heads:
                raise UserError(
                    f"ModelShape.width {self.width} is not divisible by ModelShape.heads "
                    f"{self.heads}; give ModelShape.head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.kv_heads < 0 or self.heads % self.kv_heads:
            raise UserError(
                f"ModelShape.heads {self.heads} is not divisible by "
                f"ModelShape.kv_heads {self.kv_heads}"
            )
        if self.head_dim < 0 or self.head_dim % 2:
            raise UserError(
                f"ModelShape.head_dim is {self.head_dim}, expected an even number (for RoPE)"
            )
        if self.shortcut_ratio and not 1 <= self.shortcut_ratio <= self.width:
            raise UserError(
                f"ModelShape.shortcut_ratio is {self.shortcut_ratio}, "
                f"expected 0 (none) or 1 to ModelShape.width {self.width}"
            )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table: vocab_size rounded up; padded rows never score."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def bottleneck(self) -> int:
        """Inner size of the augmented shortcut; 0 where there is none."""
        return self.width // self.shortcut_ratio if self.shortcut_ratio else 0

    def parameters_by_part(self) -> dict[str, int]:
        """Parameter counts by part, padding rows not counted; they add up to `parameters`."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        series = 2 * self.series_terms * self.ffn_width if self.series_terms > 1 else 0
        return {
            "embedding": self.vocab_size * self.width,
            "attention": self.depth * attention,
            "shortcut": self.depth * 2 * self.width * self.bottleneck,
            "ffn": self.depth * 3 * self.width * self.ffn_width,
            "series": self.depth * series,
            "norms": (2 * self.depth + 1) * self.width,
            "head": 0 if self.tied else self.vocab_size * self.width,
        }

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_part().values())

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward pass, per trained token.

        6 × (weights that multiply: all matrices and the head, tied or not)
        + 6 × depth × sequence_length × heads × head_dim (scores and values, causal half).
        """
        part = self.parameters_by_part()
        matrices = part["attention"] + part["shortcut"] + part["ffn"] + self.vocab_size * self.width
        square = self.depth * sequence_length * self.heads * self.head_dim
        return 6 * matrices + 6 * square
