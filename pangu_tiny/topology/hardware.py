"""Hardware: what a machine decides, and nothing that changes the result of a run."""

import dataclasses
from collections.abc import Sequence

import jax

from pangu_tiny.errors import UserError, check_number
from pangu_tiny.topology.slices import GENERATIONS, parse_slice


@dataclasses.dataclass(frozen=True)
class Hardware:
    """How a model is laid out and computed; free to change when a run is resumed.

    Attributes:
      data, fsdp, tensor: sizes of the mesh axes; one may be −1, "what is left".
      per_device_batch: the largest number of sequences that one device takes at once; gradient
        accumulation follows from it and the global batch.
      remat: what the backward pass recomputes: "none", "full", "attention" (keeps what attention
        gives) or "dots" (keeps what it reads too, and the products of the feed-forward).
      attention: back end, see `model/kernels.py`.
      unroll: blocks per step of the scan over depth; 0 unrolls it all, which is fastest on a CPU
        and slowest to compile.
      loss_chunk: tokens per device whose logits exist at one time.
      compilation_cache: folder in which compiled programs are kept, so that a run that is started
        again need not compile; None keeps none.
      topology: the TPU slice that the others are chosen for, as `slices.parse_slice` reads it, such
        as v5e-256; None where they fit any machine.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    per_device_batch: int = 16
    remat: str = "none"
    attention: str = "reference"
    unroll: int = 1
    loss_chunk: int = 1024
    compilation_cache: str | None = None
    topology: str | None = None

    def __post_init__(self):
        for name, least in (("per_device_batch", 1), ("loss_chunk", 1), ("unroll", 0)):
            check_number(f"Hardware.{name}", getattr(self, name), least)
        if self.topology is not None:
            parse_slice(self.topology)

    def check_devices(self, devices: Sequence[jax.Device]) -> None:
        """Refuses another machine than the slice that this is for."""
        if self.topology is None:
            return
        where, kind = parse_slice(self.topology), devices[0].device_kind
        kinds = [chip.kind for chip in GENERATIONS.values() if kind.startswith(chip.kind)]
        if len(devices) != where.chips or max(kinds, key=len, default="") != where.chip.kind:
            raise UserError(
                f"Hardware.topology is {self.topology}, {where.chips} × {where.chip.kind}, but JAX "
                f"found {len(devices)} × {kind}"
            )
