"""Options for the compiler, each with its reason; none for a CPU or a GPU."""

from jax.sharding import Mesh

_TPU = {
    # With fsdp over 16 chips each product would become a loop over slices of 1792 / 16 = 112
    # columns, which a matrix unit of 128 columns does in several times their time (the compiler's
    # own schedule of the step on v5e:4x4: 867 ms with these loops, 472 without).
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Those for the devices of a mesh."""
    return _TPU if mesh.devices.flat[0].platform == "tpu" else None
