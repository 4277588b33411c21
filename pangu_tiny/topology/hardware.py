"""Hardware: what a machine decides, and nothing that changes the result of a run."""

import dataclasses

from pangu_tiny.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """How a model is laid out and computed; free to change when a run is resumed.

    Attributes:
      data, fsdp, tensor: sizes of the mesh axes; one may be −1, "what is left".
      per_device_batch: the largest number of sequences that one device takes at once; gradient
        accumulation follows from it and the global batch.
      remat: what the backward pass recomputes: "none", "full", "dots" (keeps the matrix products)
        or "attention" (keeps only the output of attention).
      attention: back end, see `model/kernels.py`.
      unroll: blocks per step of the scan over depth; 0 unrolls it all, which is fastest on a CPU
        and slowest to compile.
      loss_chunk: tokens per device whose logits exist at one time.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    per_device_batch: int = 16
    remat: str = "none"
    attention: str = "reference"
    unroll: int = 1
    loss_chunk: int = 1024

    def __post_init__(self):
        if self.per_device_batch < 1:
            raise UserError(
                f"Hardware.per_device_batch is {self.per_device_batch}, expected at least 1"
            )
        if self.loss_chunk < 1:
            raise UserError(f"Hardware.loss_chunk is {self.loss_chunk}, expected at least 1")
        if self.unroll < 0:
            raise UserError(f"Hardware.unroll is {self.unroll}, expected 0 or more")
