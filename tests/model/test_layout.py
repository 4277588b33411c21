"""The layout of parameters: which meshes they fit."""

import jax
import pytest
from shapes import MODEL_FILES, read_shape

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.model.layout import check_divides, param_shardings, thin_shards

# (fsdp, tensor): sizes that the files of gin/hardware and a pod's slices give.
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8), (256, 1), (128, 2), (32, 8)]


@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize(("fsdp", "tensor"), MESHES)
def test_a_mesh_is_refused_just_where_a_leaf_does_not_divide(file, fsdp, tensor):
    shape = read_shape(file)
    mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
    divides = True
    try:
        jax.tree.map(
            lambda layout, leaf: layout.shard_shape(leaf.shape),
            param_shardings(shape, mesh),
            parameter_shapes(shape),
        )
    except ValueError:  # JAX's own
        divides = False
    try:
        check_divides(shape, mesh)
    except UserError as refusal:
        assert not divides, refusal
        assert "ModelShape." in str(refusal) and "Hardware." in str(refusal)
    else:
        assert divides


@pytest.mark.parametrize(
    ("file", "fsdp", "tensor"),
    [
        ("pangu_pi_1b_pro.gin", 256, 1),  # 1792 = 7 · 256, though 48,000 is no multiple of 256
        ("pangu_pi_1b_pro.gin", 128, 2),
        ("pangu_pi_1b.gin", 32, 8),
        ("pangu_pi_1_5b_pro.gin", 32, 8),
        ("pangu_pi_7b.gin", 32, 8),
    ],
)
def test_meshes_that_the_papers_models_must_fit(file, fsdp, tensor):
    mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
    check_divides(read_shape(file), mesh)


def test_refusal_names_both_sides():
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match=r"ModelShape\.heads 14 .* Hardware\.tensor 4"):
        check_divides(read_shape("pangu_pi_1b_pro.gin"), mesh)


@pytest.mark.parametrize(
    ("fsdp", "tensor", "said"),
    [
        (16, 1, []),
        (28, 1, []),  # 64 columns
        (32, 1, ["Hardware.fsdp 32 cuts ModelShape.width 1792 into 56 columns"]),
        (1, 128, ["Hardware.tensor 128 cuts ModelShape.ffn_width 4864 into 38 columns"]),
    ],
)
def test_thin_shards_are_told(fsdp, tensor, said):
    mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
    found = thin_shards(read_shape("pangu_pi_1b_pro.gin"), mesh)
    assert [line.split(",")[0] for line in found] == said


def test_norms_are_on_every_device():
    mesh = jax.sharding.AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
    layouts = param_shardings(read_shape("pangu_pi_1b_pro.gin"), mesh)
    assert layouts["blocks"]["ffn_norm"]["scale"].is_fully_replicated
    assert not layouts["blocks"]["shortcut"]["down"].is_fully_replicated
