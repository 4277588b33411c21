"""Output projections corrected by least squares: against lstsq on activations, and on teachers
where what is dropped can be made up for."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from rankings import EIGHT, first_batches, rank
from shapes import random_params
from teachers import jit_logits, save

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.rows import read_marks
from pangu_tiny.errors import UserError
from pangu_tiny.inherit import measure
from pangu_tiny.inherit.correction import OUTPUTS, least_squares
from pangu_tiny.inherit.cut_list import CutList
from pangu_tiny.inherit.importance import Importance
from pangu_tiny.inherit.inherit import inherit
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.structures import select_layers
from pangu_tiny.model.decoder import Attention, Decoder
from pangu_tiny.model.layers import AugmentedShortcut, RMSNorm, rope_tables, series_silu
from pangu_tiny.program import build
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import make_mesh

SECOND = LayerChoice(rule="listed", layers=[1])
"""Nothing has to be measured for it, and its files are not numbered from 0."""

HEADS, NEURONS = [3, 0], [*range(40, 10, -1)]
"""What stays, not in its order and not in one piece."""


def rank_second(teacher, workdir, rows, shape, hardware=EIGHT):
    model = dataclasses.replace(shape, depth=1)
    return rank(
        teacher, workdir, rows, hardware, SECOND, method="l1", model=model, output_grams=True
    )


@pytest.fixture(scope="module")
def ranked(teacher, rows, ranked_shape, tmp_path_factory):
    """Of the second layer alone, on eight devices: the workdir."""
    workdir = tmp_path_factory.mktemp("grams") / "importance"
    rank_second(teacher, workdir, rows, ranked_shape)
    return workdir


def cut_list(teacher, folder, layers, heads=None, ffn=None, **changes):
    """A file that keeps all but in heads (of 2 groups) and neurons."""
    opened = open_checkpoint(teacher)
    shape = opened.shape
    heads, ffn = heads or list(range(shape.heads)), ffn or list(range(shape.ffn_width))
    groups = list(dict.fromkeys(head // 2 for head in heads))
    block = {"kv_heads": groups, "heads": heads, "ffn": ffn}
    block |= {"bottleneck": list(range(shape.bottleneck))} | changes
    sizes = {"depth": len(layers), "heads": len(heads), "ffn_width": len(ffn)}
    model = dataclasses.replace(shape, kv_heads=len(block["kv_heads"]), **sizes)
    cuts = CutList(opened.digest, model, layers, list(range(shape.width)), [block] * len(layers))
    (folder / "list.json").write_text(cuts.to_json())
    return str(folder / "list.json")


def cut(teacher, workdir, cuts, **changes):
    inherit(teacher, str(workdir), SECOND, cuts=cuts, **changes)
    return open_checkpoint(str(workdir)).params()


@pytest.fixture(scope="module")
def activations(ranked_params, ranked_shape, rows):
    """What the output projections of the second layer read right behind the embedding, [n, F] at
    all positions of the calibration batches, by kind."""
    shape = ranked_shape
    block = jax.tree.map(lambda leaf: leaf[1], ranked_params["blocks"])
    marked = read_marks(np.concatenate(first_batches(rows)), rows.begin_id, rows.end_id)
    norm, attention = RMSNorm(shape.norm_eps), Attention(shape, "reference")
    x_btd = ranked_params["embedding"]["table"][marked.inputs]
    tables = rope_tables(np.arange(marked.inputs.shape[1]), shape.head_dim, shape.rope_theta)
    rope = tuple(table[marked.positions] for table in tables)
    normed_btd = norm.apply({"params": block["attention_norm"]}, x_btd)

    def attend(out_hkd):
        weights = block["attention"] | {"out": out_hkd}
        return attention.apply({"params": weights}, normed_btd, marked.segments, rope, None)[0]

    heads_btf = attend(jnp.eye(32).reshape(4, 8, 32))  # heads × head_dim is the width
    shortcut = AugmentedShortcut(shape.bottleneck)
    x_btd += attend(block["attention"]["out"])
    x_btd += shortcut.apply({"params": block["shortcut"]}, normed_btd)
    ffn, normed_btd = block["ffn"], norm.apply({"params": block["ffn_norm"]}, x_btd)
    gated_btf = series_silu(normed_btd @ ffn["gate"], ffn["series_scale"], ffn["series_bias"])
    neurons_btf = gated_btf * (normed_btd @ ffn["up"])
    found = {"heads": heads_btf, "ffn": neurons_btf}
    return {kind: np.asarray(x, np.float64).reshape(512, -1) for kind, x in found.items()}


@pytest.mark.parametrize("kind", ["heads", "ffn"])
def test_the_gram_matrix_is_of_what_is_read(ranked, activations, kind):
    """By the name of the teacher's layer, at all positions; to the rounding of float32."""
    x_nf = activations[kind]
    found = np.load(ranked / f"gram_{kind}_1.npy")
    assert found.dtype == np.float32 and not (ranked / f"gram_{kind}_0.npy").exists()
    expected = x_nf.T @ x_nf / len(x_nf)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("ridge", [1e-7, 0.3])
def test_it_is_least_squares_on_the_activations(
    teacher, ranked, ranked_params, activations, ridge, tmp_path
):
    """Against lstsq, which never makes a Gram matrix; the ridge as rows of its own, which pull to
    the weights as they are. What is in the Gram matrix squared, float32 there, shows as 1e-3. All
    else stays as it is without, and the folder is not for another ridge."""
    cuts = cut_list(teacher, tmp_path, [1], HEADS, NEURONS)
    settings = {"importance": str(ranked), "correct_outputs": True, "ridge": ridge}
    found = flatten_dict(cut(teacher, tmp_path / "cut", cuts, **settings), sep="/")
    teacher_flat = flatten_dict(ranked_params, sep="/")
    features = {"heads": np.arange(32).reshape(4, 8)[HEADS].reshape(-1), "ffn": np.array(NEURONS)}
    for name, kind in OUTPUTS.items():
        x_nf = activations[kind] / np.sqrt(512)
        kept_k = features[kind]
        weights_fd = np.asarray(teacher_flat[name][1], np.float64).reshape(x_nf.shape[1], -1)
        pull = np.sqrt(ridge * np.mean(np.sum(np.square(x_nf[:, kept_k]), axis=0)))
        rows_mk = np.concatenate([x_nf[:, kept_k], pull * np.eye(len(kept_k))])
        wanted_md = np.concatenate([x_nf @ weights_fd, pull * weights_fd[kept_k]])
        expected = np.linalg.lstsq(rows_mk, wanted_md)[0]
        result = np.asarray(found[name][0]).reshape(expected.shape)
        np.testing.assert_allclose(result, expected, atol=1e-3, err_msg=name)
        assert np.abs(expected - weights_fd[kept_k]).max() > 0.1
    plain = flatten_dict(cut(teacher, tmp_path / "plain", cuts), sep="/")
    assert {name for name in plain if (found[name] != plain[name]).any()} == set(OUTPUTS)
    with pytest.raises(
        UserError, match=rf"correct_outputs is \[.*{ridge}\] there, \[.*0\.1\] here"
    ):
        cut(teacher, tmp_path / "cut", cuts, **settings | {"ridge": 0.1})


@pytest.fixture(scope="module")
def doubled(ranked_shape, rows, tokenizer_of_rows, tmp_path_factory):
    """A teacher in which heads 0 and 2 and the first 8 neurons compute what others do, and its
    ranking: parameters and folders."""
    folder = tmp_path_factory.mktemp("doubled")
    params = random_params(ranked_shape)
    ffn, attention = params["blocks"]["ffn"], params["blocks"]["attention"]
    for name in ("gate", "up", "series_scale", "series_bias"):
        ffn[name] = ffn[name].at[..., :8].set(ffn[name][..., 8:16])
    query = attention["query"]
    attention["query"] = query.at[:, :, [0, 2]].set(query[:, :, jnp.array([1, 3])])
    tokenizer = {"tokenizer": tokenizer_of_rows, "sequence_length": 32}
    teacher = save(folder / "teacher", ranked_shape, params, **tokenizer)
    rank_second(teacher, folder / "importance", rows, ranked_shape)
    return params, teacher, folder / "importance"


@pytest.mark.parametrize(
    "kept", [{"heads": [1, 3]}, {"ffn": list(range(8, 48))}], ids=["heads", "ffn"]
)
def test_what_others_compute_too_is_not_missed(doubled, ranked_shape, kept, tmp_path):
    """Nor its weights: the logits are the teacher's, where without correction they are not. The
    ridge is what is left, 1e-6 of the squares and 1e-4 of the logits' size."""
    params, teacher, importance = doubled
    cuts = cut_list(teacher, tmp_path, [1], **kept)
    ids = np.random.default_rng(1).integers(0, 300, (2, 32))
    whole = Decoder(dataclasses.replace(ranked_shape, depth=1))
    expected = np.asarray(jit_logits(whole, select_layers(params, [1]), ids))
    decoder = Decoder(CutList.read(cuts).model)

    def error(name, **settings):
        found = jit_logits(decoder, cut(teacher, tmp_path / name, cuts, **settings), ids)
        return np.abs(found - expected).max() / np.abs(expected).max()

    settings = {"importance": str(importance), "correct_outputs": True, "ridge": 1e-6}
    assert error("plain") > 0.05
    assert error("corrected", **settings) < 1e-4


def test_where_nothing_is_dropped_all_bits_stay(teacher, ranked, tmp_path):
    """In any order; nor is anything read for it."""
    importance = pathlib.Path(shutil.copytree(ranked, tmp_path / "importance"))
    for path in importance.glob("gram_*"):
        path.unlink()
    order = [3, 2, 1, 0]
    cuts = cut_list(teacher, tmp_path, [1], order, list(range(47, -1, -1)), bottleneck=[2, 0, 1, 3])
    plain = cut(teacher, tmp_path / "plain", cuts)
    settings = {"importance": str(importance), "correct_outputs": True}
    found = cut(teacher, tmp_path / "corrected", cuts, **settings)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_features_that_are_silent():
    """No least squares without anything to fit with; in the type of the kernel."""
    kernel_fd = np.arange(12.0).reshape(4, 3).astype(jnp.bfloat16)
    kept_k = np.array([2, 0])
    found = least_squares(kernel_fd, np.zeros((4, 4), np.float32), kept_k, 1e-3)
    np.testing.assert_array_equal(found, kernel_fd[kept_k], strict=True)
    alike = np.ones((4, 4), np.float32)
    found = least_squares(kernel_fd, alike, kept_k, 1e-6)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.sum(axis=0), kernel_fd.sum(axis=0), rtol=1e-2)


def test_the_layout_changes_nothing(teacher, rows, ranked, ranked_shape, tmp_path):
    """One device that takes a batch whole, or eight, in two parts a batch, each with its rows of
    the matrix; the tolerance is that of float32 sums in another order."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    one = Hardware(data=1, fsdp=1, tensor=1, per_device_batch=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda *_: mesh)
        rank_second(teacher, tmp_path / "one", rows, ranked_shape, one)
    for kind in ("heads", "ffn"):
        single, eight = (np.load(x / f"gram_{kind}_1.npy") for x in (tmp_path / "one", ranked))
        np.testing.assert_allclose(eight, single, atol=1e-6 * np.abs(single).max())


@pytest.mark.parametrize(("size", "parts"), [(48, 8), (44, 2)])
def test_rows_of_the_matrix_lie_on_all_devices(size, parts):
    """Where their number divides them, else on those that share the projection."""
    mesh = make_mesh(1, 4, 2)
    layout = measure._cut_by_rows(mesh, size)
    assert layout.shard_shape((2, size, size)) == (2, size // parts, size)


class _Interrupted(Exception):
    pass


def test_an_interrupted_ranking_goes_on(teacher, rows, ranked, ranked_shape, tmp_path):
    """Files that are there are not measured again; where one is missing, it is made with the same
    bits."""

    def interrupt(*_):
        raise _Interrupted

    def interrupted(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, name, interrupt)
            rank_second(teacher, tmp_path / "cut", rows, ranked_shape)

    lost = tmp_path / "cut" / "gram_ffn_1.npy"
    for _ in range(2):
        with pytest.raises(_Interrupted):
            interrupted("magnitudes")
        assert lost.read_bytes() == (ranked / lost.name).read_bytes()
        lost.unlink()
    with pytest.raises(_Interrupted):
        interrupted("grams")
    shutil.copy(ranked / lost.name, lost)
    interrupted("grams")
    assert Importance.open(str(tmp_path / "cut")).has_grams([1])


def test_what_it_needs(teacher, ranked, rows, ranked_shape, tmp_path):
    found = Importance.open(str(ranked))
    bare = tmp_path / "bare"
    bare.mkdir()
    Importance(found.about | {"output_grams": False}, found.arrays).write(epath.Path(bare))
    second = cut_list(teacher, tmp_path, [1], HEADS)
    for importance in (None, str(bare)):
        with pytest.raises(UserError, match=r"a rank-teacher with rank_teacher\.output_grams = Tr"):
            cut(teacher, tmp_path / "no", second, importance=importance, correct_outputs=True)
    settings = {"importance": str(ranked), "correct_outputs": True}
    first = cut_list(teacher, tmp_path, [0], HEADS)
    with pytest.raises(UserError, match=r"layers \[0\] are to stay, but importance was measured"):
        cut(teacher, tmp_path / "no", first, **settings)
    merged = cut_list(teacher, tmp_path, [1], [1, 2], kv_heads=[[0, 1]])
    with pytest.raises(UserError, match=r"means of key-value heads, \[0, 1\] in blocks\[0\]"):
        cut(teacher, tmp_path / "no", merged, **settings)
    for ridge in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(UserError, match=rf"ridge is {ridge}, expected more than 0 and finite"):
            cut(teacher, tmp_path / "no", merged, ridge=ridge)
    with pytest.raises(UserError, match=r"output_grams needs rank_teacher\.dataset"):
        rank(teacher, tmp_path / "no", None, method="l1", output_grams=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read: .*; rank the te"),
        (lambda path: path.write_bytes(b""), "cannot be read: "),
        (lambda path: path.unlink(), "cannot be read: "),
        (lambda path: np.save(path, np.ones((8, 8))), r"is \[8, 8\], expected \[48, 48\]"),
        (lambda path: np.save(path, np.full((48, 48), np.nan)), "nothing that is NaN or infinite"),
    ],
)
def test_damaged_matrices(teacher, ranked, damage, said, tmp_path):
    importance = pathlib.Path(shutil.copytree(ranked, tmp_path / "importance"))
    damage(importance / "gram_ffn_1.npy")
    cuts = cut_list(teacher, tmp_path, [1], ffn=NEURONS)
    with pytest.raises(UserError, match=rf"gram_ffn_1\.npy.* {said}"):
        cut(teacher, tmp_path / "no", cuts, importance=str(importance), correct_outputs=True)
    with pytest.raises(UserError, match="no checkpoint there"):
        open_checkpoint(str(tmp_path / "no"))
