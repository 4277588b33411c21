"""A checkpoint written part by part is one like any other, and is there whole or not at all."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import flip, flipped
from etils import epath
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import TINY, random_params

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.checkpoints.write import FLOATS, Part, parts_of, write_parts
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import parameter_axes
from pangu_tiny.topology.mesh import make_mesh, named_sharding

FACTS = {"label": "write", "identity": {"tokenizer": "t"}, "sequence_length": 64}


def parts(params):
    flat = flatten_dict(params, sep="/")
    return [
        Part(name, layer, np.asarray(flat[name] if layer is None else flat[name][layer]))
        for name, layer in parts_of(TINY)
    ]


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "checkpoints"


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_read_whole_and_in_parts(params, dtype, folder, tmp_path):
    """In parts as it is stored, whole as float32, in any order of writing and on any mesh."""
    random = np.random.default_rng(0)
    shuffled = parts(params)
    random.shuffle(shuffled)
    path = write_parts(folder, TINY, dtype, shuffled, b"tokens", **FACTS)
    opened = open_checkpoint(str(tmp_path))
    assert opened.path == path and opened.shape == TINY and opened.dtype == dtype
    assert opened.tokenizer_bytes == b"tokens" and opened.about["step"] == 0
    mesh = make_mesh(1, 4, 2)
    layout = jax.tree.map(
        lambda axes: named_sharding(mesh, axes),
        parameter_axes(TINY),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    stored = {(name, layer): value.astype(dtype) for name, layer, value in shuffled}
    for found in (opened.params(), opened.params(layout)):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
        for name, layer, value in parts(found):
            np.testing.assert_array_equal(value, stored[name, layer].astype("float32"), name)
    for (name, layer), value in stored.items():
        np.testing.assert_array_equal(opened.leaf(name).read(layer), value, strict=True)


def test_a_layer_is_a_chunk(params, folder, tmp_path):
    """Reading one layer must not read the others."""
    write_parts(folder, TINY, "bfloat16", parts(params), b"t", **FACTS)
    array = open_checkpoint(str(tmp_path)).leaf("blocks/ffn/gate")._array
    assert array.chunk_layout.read_chunk.shape == (1, TINY.width, TINY.ffn_width)


def test_a_damaged_layer_is_named_and_no_other(params, written):
    chunk = written / "params" / "blocks.ffn.gate" / "c" / "1" / "0" / "0"
    content = chunk.read_bytes()
    opened = open_checkpoint(str(written))
    leaf = opened.leaf("blocks/ffn/gate")
    for damage in (flip, pathlib.Path.unlink):  # zeros, if nobody asks for an error
        damage(chunk)
        gate = params["blocks"]["ffn"]["gate"]
        np.testing.assert_array_equal(leaf.read(0), gate[0])
        for read in (lambda: leaf.read(1), opened.params):
            with pytest.raises(UserError, match=f"cannot be read: .*{chunk}"):
                read()
        chunk.write_bytes(content)


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None)
def test_64_bytes_flipped_anywhere_are_found(written, share):
    with flipped(written, share), pytest.raises(UserError, match="cannot be read: "):
        open_checkpoint(str(written)).params()


@pytest.fixture(scope="module")
def written(params, tmp_path_factory):
    """A checkpoint that every test leaves as it was."""
    folder = epath.Path(tmp_path_factory.mktemp("written")) / "checkpoints"
    return pathlib.Path(write_parts(folder, TINY, "float32", parts(params), b"t", **FACTS))


@pytest.mark.parametrize("stop", [0, 1, 20])
def test_what_was_not_finished_is_no_checkpoint(params, stop, folder, tmp_path):
    """An interruption, then the whole again; without it, zeros would pass for parameters."""

    def interrupted():
        yield from parts(params)[:stop]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parts(folder, TINY, "float32", interrupted(), b"t", **FACTS)
    with pytest.raises(UserError, match="no checkpoint there"):
        open_checkpoint(str(tmp_path))
    write_parts(folder, TINY, "float32", parts(params), b"t", **FACTS)
    found = flatten_dict(open_checkpoint(str(tmp_path)).params(), sep="/")
    for name, leaf in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(found[name], leaf, name)


def test_a_copy_that_was_not_finished_is_no_checkpoint(params, folder, tmp_path):
    """Where renaming is copying, as on gs://, a kill may leave all but the arrays."""

    rename = type(folder).rename

    def copy_half(path, target):
        if target.name != "0":
            return rename(path, target)  # Orbax's own
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("params"))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(folder), "rename", copy_half)
        with pytest.raises(KeyboardInterrupt):
            write_parts(folder, TINY, "float32", parts(params), b"t", **FACTS)
    assert (folder / "0" / "about").exists()
    for place in (tmp_path, folder / "0"):
        with pytest.raises(UserError, match="no checkpoint there"):
            open_checkpoint(str(place))
    write_parts(folder, TINY, "float32", parts(params), b"t", **FACTS)
    found = open_checkpoint(str(tmp_path)).params()
    np.testing.assert_array_equal(found["final_norm"]["scale"], params["final_norm"]["scale"])


def test_every_part_is_written_once(params, folder):
    all_parts = parts(params)
    with pytest.raises(ValueError, match="never written"):
        write_parts(folder / "a", TINY, "float32", all_parts[:-1], b"t", **FACTS)
    with pytest.raises(KeyError):
        write_parts(folder / "b", TINY, "float32", [*all_parts, all_parts[0]], b"t", **FACTS)
    with pytest.raises(ValueError, match="expected"):
        name, layer, value = all_parts[-1]
        wrong = Part(name, layer, value[..., :-1])
        write_parts(folder / "c", TINY, "float32", [*all_parts[:-1], wrong], b"t", **FACTS)


def test_a_leaf_that_is_not_there_is_said(params, folder, tmp_path):
    write_parts(folder, TINY, "float32", parts(params), b"t", **FACTS)
    with pytest.raises(UserError, match="head/none cannot be opened"):
        open_checkpoint(str(tmp_path)).leaf("head/none")
