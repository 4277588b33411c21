"""Checkpoints: what was saved is what is read, or it is said that it cannot be."""

import dataclasses
import hashlib
import logging
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_files import flip, flipped
from etils import epath
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import SHAPE, assert_same_bits, read_arrays

from pangu_tiny.checkpoints import checksums
from pangu_tiny.checkpoints.read import committed_steps, describe, open_checkpoint
from pangu_tiny.checkpoints.run import Writer
from pangu_tiny.checkpoints.write import chunk_by_layer
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder, parameter_shapes
from pangu_tiny.model.layout import param_shardings
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import abstract_state
from pangu_tiny.topology.mesh import make_mesh

MODEL = b"no model, but bytes all the same \x00\xff" * 50
TRANSFORMATION = Optimizer().transformation(lambda _: 1e-3)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 4, 2)


@pytest.fixture(scope="module")
def target(mesh):
    return abstract_state(Decoder(SHAPE), TRANSFORMATION, mesh)


def state_at(target, step):
    """A state whose every leaf is told by its step and place, laid out over the devices."""
    random = np.random.default_rng(step)

    def draw(leaf):
        whole = random.integers(0, 1000, leaf.shape) if leaf.shape else np.asarray(step)
        return jax.device_put(whole.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, target)


def arrays(state):
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in named}


def save(writer, step, target):
    about = describe(SHAPE, identity={"tokenizer": "t"}, step=step)
    writer.save(step, state_at(target, step), about, MODEL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, target):
    """A folder with the steps 10 and 20."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    writer = Writer(folder, keep_every=10)
    for step in (10, 20):
        save(writer, step, target)
    writer.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_what_was_saved_is_read(folder, target):
    state, about = Writer(folder, 10).restore_latest(target)
    assert_same_bits(arrays(state), arrays(state_at(target, 20)))
    jax.tree.map(
        lambda leaf, wanted: leaf.sharding == wanted.sharding or pytest.fail(), state, target
    )
    assert about["step"] == 20 and about["model"] == dataclasses.asdict(SHAPE)


def test_another_layout_reads_the_same(folder, target):
    mesh = make_mesh(2, 2, 2)
    other = abstract_state(Decoder(SHAPE), TRANSFORMATION, mesh)
    state, _ = Writer(folder, 10).restore_latest(other)
    assert_same_bits(arrays(state), arrays(state_at(target, 20)))


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/10"])
def test_a_checkpoint_opens_by_its_path_alone(folder, place, target, mesh):
    step = 10 if place.endswith("10") else 20
    opened = open_checkpoint(str(folder.parent / place))
    assert opened.shape == SHAPE and opened.about["step"] == step
    assert opened.tokenizer_bytes == MODEL
    expected = arrays(state_at(target, step).params)
    assert_same_bits(arrays(opened.params()), expected)
    assert_same_bits(arrays(opened.params(param_shardings(SHAPE, mesh))), expected)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there, expected a train workdir or step"):
        open_checkpoint(str(tmp_path / "none"))


def changed(target, change):
    """The target with its embedding table changed."""
    table = target.params["embedding"]["table"]
    new = jax.ShapeDtypeStruct(
        **{"shape": table.shape, "dtype": table.dtype, "sharding": table.sharding, **change}
    )
    return target._replace(params={**target.params, "embedding": {"table": new}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (256, 32)}, r"embedding/table is float32\[384, 32\] there, float32\[256, 32\]"),
        ({"shape": (512, 32)}, r"float32\[512, 32\] expected"),
        ({"dtype": jnp.bfloat16}, r"is float32\[384, 32\] there, bfloat16\[384, 32\] expected"),
    ],
    ids=["smaller", "larger", "dtype"],
)
def test_another_shape_or_dtype_is_refused(folder, target, change, said):
    """Orbax itself casts silently, and with other settings cuts and pads."""
    with pytest.raises(UserError, match=said):
        Writer(folder, 10).restore_latest(changed(target, change))
    assert committed_steps(folder) == [20, 10], "a misfit is no damage"


def test_leaves_too_many_or_too_few_are_refused(folder, target):
    fewer = {name: part for name, part in target.params.items() if name != "head"}
    more = {**target.params, "extra": {"kernel": target.params["final_norm"]["scale"]}}
    for params, said in ((fewer, "head/kernel .* absent expected"), (more, "extra/kernel is abs")):
        with pytest.raises(UserError, match=said):
            Writer(folder, 10).restore_latest(target._replace(params=params))


FILES = [
    "about/metadata",
    "about/checksums",
    "params/_METADATA",
    "params/manifest.ocdbt",
    "params/d/*",
    "params/ocdbt.process_0/manifest.ocdbt",
    "params/ocdbt.process_0/d/*",
    "params/ocdbt.process_0/values/*",
    "optimizer/ocdbt.process_0/values/*",
    "tokenizer/d/*",
]
"""Every kind of file of a step; data files have random names."""


@pytest.mark.parametrize("damage", ["deleted", "truncated", "a bit"])
@pytest.mark.parametrize("kind", FILES)
def test_damage_is_never_silent(folder, target, kind, damage, capsys):
    """The step before is read, and the damaged one is named in one line and set aside."""
    file = max((folder / "20").glob(kind), key=lambda file: file.stat().st_size)
    if damage == "a bit":
        flip(file)
    else:
        content = file.read_bytes()
        file.unlink()
        if damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
    state, about = Writer(folder).restore_latest(target)
    out = capsys.readouterr().out.splitlines()
    assert_same_bits(arrays(state), arrays(state_at(target, 10)))
    assert about["step"] == 10 and len(out) == 1
    said, reason = out[0].split("resuming from step 10: ")
    assert said == f"checkpoint {folder / '20'} is damaged, renamed to 20.damaged, "
    item = kind.split("/")[0]
    assert str(folder / "20" / item) in reason, "the file is not named"
    assert committed_steps(folder) == [10]
    assert (folder / "20.damaged").is_dir()


def test_checksums_of_before_they_were_checked_themselves_are_read(folder, target):
    """Format 2: the list of checksums ends without a line about itself. A list of today that lost
    that line is damaged."""
    about = folder / "20" / "about"
    sums, metadata = about / "checksums", about / "metadata"
    lines = sums.read_text().splitlines(keepends=True)[:-1]
    sums.write_text("".join(lines))
    with pytest.raises(ValueError, match="checksums is damaged"):
        checksums.check(folder / "20")
    metadata.write_text(metadata.read_text().replace('"format": 3', '"format": 2'))
    digest = hashlib.sha256(metadata.read_bytes()).hexdigest()
    kept = [line for line in lines if not line.endswith("about/metadata\n")]
    sums.write_text("".join([*kept, f"{digest}  about/metadata\n"]))
    checksums.check(folder / "20")
    for damage in ("", "no list\n", "".join(kept)):
        sums.write_text(damage)
        with pytest.raises(ValueError, match=r"about/checksums is damaged"):
            checksums.check(folder / "20")


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None)
def test_64_bytes_flipped_anywhere_are_found(only_one, target, share):
    """Of all bytes of all files of a step, whether anything needs them or not."""
    with (
        flipped(only_one / "20", share),
        pytest.raises(UserError, match=r"no checkpoint in .* can be read \(20: "),
    ):
        Writer(only_one).restore_latest(target)


@pytest.fixture(scope="module")
def only_one(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "checkpoints"
    shutil.copytree(saved / "20", folder / "20")
    return folder


def save_as_before(path, step, target):
    """A checkpoint without checksums, as Orbax writes it by default."""
    state = state_at(target, step)
    beside = {"moments": state.optimizer, "step": state.step, "skipped": state.skipped}
    about = {**describe(SHAPE, identity={"tokenizer": "t"}, step=step), "format": 1}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            path / str(step),
            ocp.args.Composite(
                params=ocp.args.StandardSave(state.params, chunk_by_layer(state.params)),
                optimizer=ocp.args.StandardSave(beside),
                tokenizer=ocp.args.StandardSave({"model": np.frombuffer(MODEL, np.uint8)}),
                about=ocp.args.JsonSave(about),
            ),
        )


def test_a_checkpoint_from_before_checksums_is_read_and_said_to_be(tmp_path, target, capsys):
    path = tmp_path / "checkpoints"
    save_as_before(path, 10, target)
    said = f"checkpoint {path / '10'} was written before checksums and carries none"
    opened = open_checkpoint(str(path))
    assert capsys.readouterr().err.splitlines() == [said]
    expected = state_at(target, 10)
    assert_same_bits(arrays(opened.params()), arrays(expected.params))
    gate = expected.params["blocks"]["ffn"]["gate"]
    np.testing.assert_array_equal(opened.leaf("blocks/ffn/gate").read(1), gate[1])
    capsys.readouterr()
    writer = Writer(path)
    state, _ = writer.restore_latest(target)
    assert capsys.readouterr().err.splitlines() == [said]
    assert_same_bits(arrays(state), arrays(expected))
    save(writer, 20, target)
    writer.close()
    assert open_checkpoint(str(path)).about["step"] == 20
    assert capsys.readouterr().err == ""


def test_a_step_can_be_saved_again_after_its_damage(folder, target):
    """Twice, since what was set aside before must not be in the way."""
    for _ in range(2):
        shutil.rmtree(folder / "20" / "optimizer")
        writer = Writer(folder, 10)
        writer.restore_latest(target)
        save(writer, 20, target)
        writer.close()
        state, _ = Writer(folder, 10).restore_latest(target)
        assert_same_bits(arrays(state), arrays(state_at(target, 20)))


def test_nothing_readable_is_an_error_and_not_a_new_start(folder, target):
    for step in (10, 20):
        shutil.rmtree(folder / str(step) / "params" / "d")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(20: .*; 10: .*\); to "):
        Writer(folder, 10).restore_latest(target)
    assert committed_steps(folder) == [20, 10], "what nothing replaces is left as it is"


def test_damaged_parameters_are_said_when_they_are_read(folder):
    shutil.rmtree(folder / "20" / "params" / "d")
    with pytest.raises(UserError, match="20 cannot be read"):
        open_checkpoint(str(folder)).params()


def test_an_empty_numbered_folder_is_no_checkpoint(folder, target, capsys):
    """Orbax takes it for one: it would count among those to keep, and refuse its number."""
    (folder / "30").mkdir()
    assert committed_steps(folder) == [20, 10]
    assert open_checkpoint(str(folder)).about["step"] == 20
    writer = Writer(folder)
    assert "30 is no finished checkpoint and is set aside" in capsys.readouterr().out
    assert writer.restore_latest(target)[1]["step"] == 20
    for step in (25, 30):
        save(writer, step, target)
    writer.close()
    assert committed_steps(folder) == [30, 25]


def test_an_empty_folder_restores_nothing(tmp_path, target):
    assert Writer(tmp_path / "checkpoints", 10).restore_latest(target) is None


def test_every_nth_stays_and_of_the_others_the_newest_two(tmp_path, target):
    """What stays opens without moments where they were dropped, but no run goes on from it."""
    folder = epath.Path(tmp_path) / "checkpoints"
    writer = Writer(folder, keep_every=2, drop_moments=True)
    for step in range(1, 6):
        save(writer, step, target)
    writer.close()
    assert committed_steps(writer.folder) == [5, 4, 2]
    opened = [open_checkpoint(str(writer.folder / str(step))) for step in (5, 4, 2)]
    assert [checkpoint.has_moments for checkpoint in opened] == [True, True, False]
    assert_same_bits(arrays(opened[2].params()), arrays(state_at(target, 2).params))
    for step in (5, 4):
        shutil.rmtree(writer.folder / str(step))
    with pytest.raises(UserError, match=r"2 was kept without moments, no run can resume from it"):
        writer.restore_latest(target)


def test_the_state_may_be_consumed_while_it_is_written(tmp_path, target):
    """On a CPU, arrays given to Orbax may be views of what the next step writes to. The donated
    buffers are written a hundred times while the save is under way."""

    def spoil(state):
        return jax.tree.map(lambda leaf: leaf + 1, state)

    layouts = jax.tree.map(lambda leaf: leaf.sharding, target)
    spoil = jax.jit(spoil, donate_argnums=0, out_shardings=layouts)
    writer = Writer(tmp_path / "checkpoints", keep_every=1)
    for step in (1, 2, 3):
        state = state_at(target, step)
        writer.save(step, state, describe(SHAPE, step=step), MODEL)
        for _ in range(100):
            state = jax.block_until_ready(spoil(state))
    writer.close()
    for step in (1, 2, 3):
        found = read_arrays(writer.folder / str(step) / "params")
        assert_same_bits(found, arrays(state_at(target, step).params))


def test_stacked_leaves_have_a_chunk_for_each_layer(saved):
    """So that a layer can be read without the others, with its own checksum."""
    names = flatten_dict(parameter_shapes(SHAPE), sep="/")
    stacked = [name for name in names if name.startswith("blocks/")]
    assert len(stacked) == 13
    for name in stacked:
        array = open_checkpoint(str(saved)).leaf(name)._array
        assert array.chunk_layout.read_chunk.shape[0] == 1, name
        assert array.codec.to_json()["codecs"][-1] == {"name": "crc32c"}, name


@pytest.fixture
def small_files():
    """Files of more than 20 kB cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_last_good_checkpoint_stays(folder, target, small_files):
    writer = Writer(folder, 10)
    small_files()
    with pytest.raises(
        UserError, match=r"could not be saved in .*, the last that was saved is step 20"
    ):
        save(writer, 30, target)
        writer.wait()
    assert committed_steps(folder) == [20, 10]


def test_only_traces_of_a_save_that_fails_are_held_back(tmp_path, target, caplog):
    """On a pod, what Orbax warns of is what one needs."""
    writer = Writer(tmp_path / "checkpoints")
    save(writer, 1, target)
    orbax = logging.getLogger("absl")
    orbax.error("slow disk")
    try:
        raise OSError("no quota")
    except OSError:
        orbax.exception("deletion failed")
    assert "slow disk" in caplog.messages and "deletion failed" not in caplog.messages
    writer.close()
    assert "deletion failed" in caplog.messages
