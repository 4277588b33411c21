"""Output projections that make up for what they no longer read, by least squares.

Let X [n, F] be what a projection W [F, d] reads in the teacher, at n calibration positions: the
neurons of a layer, or what its heads put out, head after head. Of all projections that read the
features K alone, the one closest to X·W is

  W' = W_K + (G_KK + λ · mean(diag G_KK) · I)⁻¹ · G_KD · W_D,  G = XᵀX / n,

with D the features that are dropped and λ a ridge. So G is all that is needed of X. Not in the
paper; as in channel pruning (He et al. 2017, arXiv:1707.06168).

Axes: f features that a projection reads, k those that stay, d width.
"""

import dataclasses

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_array
from pangu_tiny.errors import UserError

OUTPUTS = {"blocks/attention/out": "heads", "blocks/ffn/down": "ffn"}
"""What is corrected → the axis along which it is cut."""

_AGAIN = "rank the teacher again, in another workdir"


@dataclasses.dataclass(frozen=True)
class Correction:
    """The Gram matrices in a folder of rank-teacher, read a layer at a time; the ridge is λ."""

    folder: epath.Path
    ridge: float

    def cut(self, kernel: np.ndarray, kind: str, layer: int, kept: list[int]) -> np.ndarray:
        """The structures `kept` of an output projection, corrected for the others.

        Args:
          kernel: [ffn, d] or [heads, head_dim, d], of this layer of the teacher.
          kind: "ffn" or "heads".
        """
        if len(kept) == len(kernel):
            return kernel[kept]
        features = np.arange(kernel[..., 0].size).reshape(kernel.shape[:-1])
        kept_k = features[kept].reshape(-1)
        gram_ff = read_gram(self.folder, kind, layer, features.size)
        kernel_fd = kernel.reshape(features.size, -1)
        found_kd = least_squares(kernel_fd, gram_ff, kept_k, self.ridge)
        return found_kd.reshape(-1, *kernel.shape[1:])


def least_squares(
    kernel_fd: np.ndarray, gram_ff: np.ndarray, kept_k: np.ndarray, ridge: float
) -> np.ndarray:
    """W' [k, d] of the head of this file, computed in float64, in the dtype of the kernel."""
    dropped = np.setdiff1d(np.arange(len(kernel_fd)), kept_k)
    gram_kk = gram_ff[np.ix_(kept_k, kept_k)].astype(np.float64)
    size = np.trace(gram_kk) / len(gram_kk)
    if size == 0:  # all that stays is silent
        return kernel_fd[kept_k]
    gram_kk[np.diag_indices_from(gram_kk)] += ridge * size
    lost_kd = gram_ff[np.ix_(kept_k, dropped)].astype(np.float64) @ kernel_fd[dropped].astype(
        np.float64
    )
    found_kd = kernel_fd[kept_k].astype(np.float64) + np.linalg.solve(gram_kk, lost_kd)
    return found_kd.astype(kernel_fd.dtype)


def gram_file(folder: epath.Path, kind: str, layer: int) -> epath.Path:
    """Of a layer of the teacher, from 0."""
    return folder / f"gram_{kind}_{layer}.npy"


def read_gram(folder: epath.Path, kind: str, layer: int, size: int) -> np.ndarray:
    """Reads a Gram matrix of rank-teacher."""
    path = gram_file(folder, kind, layer)
    try:
        gram_ff = read_array(path)
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN}") from error
    if gram_ff.shape != (size, size) or not np.isfinite(gram_ff).all():
        raise UserError(
            f"{path} is {list(gram_ff.shape)}, expected {[size, size]} and nothing that is NaN or "
            f"infinite; {_AGAIN}"
        )
    return gram_ff
