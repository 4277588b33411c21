"""Options for the compiler, each with its reason, and where what it made is kept."""

import uuid

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from pangu_tiny.errors import failing_as
from pangu_tiny.topology.slices import GENERATIONS

_TPU = {
    # With fsdp over 16 chips each product would become a loop over slices of 1792 / 16 = 112
    # columns, which a matrix unit of 128 columns does in several times their time (the compiler's
    # own schedule of the step on v5e:4x4: 867 ms with these loops, 472 without).
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_LARGE_TILES = {
    # Fast memory that one fused product may fill; with the default the tiles are too small for
    # these chips (PanGu-π-1B Pro on v5p:4x4x8, 16 sequences a chip: 815 ms with the default, 652
    # with this; on v6e:16x16 194 and 185, for 70 s more to compile; on v5e:4x4 it is the other way
    # round, 408 and 418).
    "xla_tpu_scoped_vmem_limit_kib": "98304",
}
_SPARSE_CORES = {
    # These chips cannot gather within a product, as a v5e does; their sparse cores gather beside
    # it. The settings are those of MaxText (PanGu-π-1B Pro on v6e:16x16, 4 sequences a chip: 207 ms
    # before, 185 with them; on v5p:4x4x8, 8 a chip, 365 and 351).
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disable_megacore_partitioning": "true",
}
_BY_KIND = {GENERATIONS[name].kind: _LARGE_TILES | _SPARSE_CORES for name in ("v5p", "v6e")}


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder, for later starts of the same run."""
    path = epath.Path(folder).expanduser()
    with failing_as(f"Hardware.compilation_cache {folder!r} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        mark = path / f".{uuid.uuid4().hex}.tmp"  # other processes leave their own
        mark.write_text("")
        mark.unlink()
    jax.config.update("jax_compilation_cache_dir", str(path))
    compilation_cache.reset_cache()  # what was compiled before may have opened another


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Those for the devices of a mesh; None for a CPU or a GPU."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    return _TPU | _BY_KIND.get(device.device_kind, {})
