"""What plan says of programs whose time can be told from published rates: at least as long, and no
more than 1.6 times that; of sizes for which what a loop copies is little."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pangu_tiny.planning import hlo
from pangu_tiny.planning.collectives import Placed
from pangu_tiny.planning.devices import compile_for, devices_of
from pangu_tiny.planning.estimate import estimate
from pangu_tiny.planning.kernels import Attention, kernel_cycles
from pangu_tiny.planning.programs import Planned
from pangu_tiny.planning.schedule import read_schedule
from pangu_tiny.topology.compiler import compiler_options
from pangu_tiny.topology.mesh import make_mesh
from pangu_tiny.topology.slices import parse_slice

SIZE, TURNS = 8192, 6
pytestmark = pytest.mark.pods
TRAINING = ("fwd_segmented_residuals", "dkv_segmented_no_residuals", "dq_segmented_no_residuals")


def product(x, y):
    return x @ y


def chain(x, y):
    return jax.lax.scan(lambda x, _: (x @ y, None), x, length=TURNS)[0]


def elementwise(x, y):
    return x * y + 1


def seconds(function, dtype, where):
    mesh = make_mesh(1, 1, 1, devices_of(where)[:1])
    layout = NamedSharding(mesh, PartitionSpec())
    matrix = jax.ShapeDtypeStruct((SIZE, SIZE), dtype, sharding=layout)
    compiled = jax.jit(function, compiler_options=compiler_options(mesh))
    program = Planned(compiled, (matrix, matrix), {}, mesh, None, {}, 1, 1, 1, 1, backward=False)
    text = compile_for(program, where).text
    chips = [device.coords for device in mesh.devices.flat]
    schedule = read_schedule(hlo.parse(text), Placed(where, 1e9, chips))
    assert not schedule.unknown_loops
    return estimate(schedule, where, {}).total


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(
    ("function", "dtype", "flops", "moved"),
    [
        (product, "bfloat16", 2 * SIZE**3, 0),
        (chain, "bfloat16", 2 * SIZE**3 * TURNS, 0),
        (elementwise, "float32", 0, 12 * SIZE**2),
    ],
)
def test_a_program_takes_what_its_operations_take(
    function, dtype, flops, moved, topology, monkeypatch
):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    where = parse_slice(topology)
    least = flops / where.chip.peak + moved / where.chip.memory_rate
    assert 1.0 <= seconds(function, dtype, where) / least <= 1.6


def test_the_attention_kernel_takes_what_its_products_take():
    """Two forward, and seven in two kernels backward, each of which computes the scores and their
    gradient anew. Masks, powers and sums run beside them, and take the rest."""
    pytest.importorskip("libtpu")
    where = parse_slice("v5e:2x2")
    attention = Attention(where.topology, 4, 14, 14, 2048, 128, 1024)
    found = kernel_cycles(attention)
    cycles = sum(found[f"splash_mha_{name}"] for name in TRAINING)
    flops = 9 * 2 * attention.blocks * attention.block**2 * attention.head_dim
    assert 1.0 <= cycles / where.chip.clock / (flops / where.chip.peak) <= 1.6
