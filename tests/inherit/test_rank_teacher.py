"""What rank-teacher finds: formulas by hand, on any layout, after any interruption."""

import dataclasses
import functools
import itertools
import json
import sys

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from rankings import CHOICE, EIGHT, FEW, first_batches, rank
from teachers import save
from tiny_runs import prepare, start_together

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import held_out_batches
from pangu_tiny.data.rows import read_marks
from pangu_tiny.errors import UserError
from pangu_tiny.inherit import calibration, measure
from pangu_tiny.inherit.importance import ABOUT, ARRAYS, Importance
from pangu_tiny.inherit.inherit import inherit
from pangu_tiny.inherit.layers import LayerChoice, window_scores
from pangu_tiny.inherit.structures import select_layers
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.program import build
from pangu_tiny.program.step import Objective
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import make_mesh

SMALL = {"width": 24, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_width": 32, "depth": 1}
SMALL |= {"shortcut_ratio": 8, "series_terms": 2, "vocab_size": 300}


@pytest.fixture(scope="module")
def small(ranked_shape):
    return dataclasses.replace(ranked_shape, **SMALL)


@pytest.fixture(scope="module")
def found(teacher, rows, tmp_path_factory):
    """By method, on the whole teacher, on eight devices."""
    folder = tmp_path_factory.mktemp("ranked")
    return {
        method: rank(teacher, folder / method, rows, method=method)
        for method in ("l1", "l2", "taylor", "activation")
    }


@pytest.fixture(scope="module")
def cut_found(teacher, rows, small, tmp_path_factory):
    """By method, for the small shape; each is made when it is first asked for."""

    @functools.cache
    def make(method):
        workdir = tmp_path_factory.mktemp("cut") / method
        grams = method == "learned"  # it is here that two processes measure them too
        settings = {"method": method, "model": small, "output_grams": grams}
        return rank(teacher, workdir, rows, **settings), str(workdir)

    return make


def nats_per_token(params, shape, rows, batch):
    objective = Objective(Decoder(shape), rows.begin_id, rows.end_id, 1024)
    loss, marked = jax.jit(lambda params, batch: objective(params, batch))(params, batch)
    return loss.total / marked.weights.sum()


@pytest.mark.parametrize(("method", "power"), [("l1", 1), ("l2", 2)])
def test_norms_of_a_structure(found, ranked_params, method, power):
    """Of all weights that it reads or writes with, and for a channel those of embedding, norms
    and head too; rows of the vocabulary that are padding do not count."""
    arrays = found[method].arrays
    size = {name: np.abs(x) ** power for name, x in flatten_dict(ranked_params, sep="/").items()}
    ffn, attention = "blocks/ffn/", "blocks/attention/"
    neurons = size[f"{ffn}gate"].sum(1) + size[f"{ffn}up"].sum(1) + size[f"{ffn}down"].sum(2)
    neurons += size[f"{ffn}series_scale"].sum(1) + size[f"{ffn}series_bias"].sum(1)
    np.testing.assert_allclose(arrays["ffn"], neurons, rtol=1e-5)
    heads = size[f"{attention}query"].sum((1, 3)) + size[f"{attention}out"].sum((2, 3))
    np.testing.assert_allclose(arrays["heads"], heads, rtol=1e-5)
    own = size[f"{attention}key"].sum((1, 3)) + size[f"{attention}value"].sum((1, 3))
    groups = own + heads.reshape(2, 2, 2).sum(-1)
    np.testing.assert_allclose(arrays["kv_heads"], groups, rtol=1e-5)
    outside = size["embedding/table"][:300].sum(0) + size["final_norm/scale"]
    outside = outside + size["head/kernel"][:, :300].sum(1)
    np.testing.assert_allclose(arrays["embed_outside"], outside, rtol=1e-5)
    reading = [f"{ffn}gate", f"{ffn}up", "blocks/shortcut/down"]
    channels = sum(size[name].sum(2) for name in reading)
    channels += sum(size[f"{attention}{name}"].sum((2, 3)) for name in ("query", "key", "value"))
    channels += size[f"{attention}out"].sum((1, 2))
    channels += size[f"{ffn}down"].sum(1) + size["blocks/shortcut/up"].sum(1)
    channels += size["blocks/attention_norm/scale"] + size["blocks/ffn_norm/scale"]
    np.testing.assert_allclose(arrays["embed"], channels, rtol=1e-5)
    bottleneck = size["blocks/shortcut/down"].sum(1) + size["blocks/shortcut/up"].sum(2)
    np.testing.assert_allclose(arrays["bottleneck"], bottleneck, rtol=1e-5)


def test_taylor_is_weight_times_gradient(found, ranked_params, ranked_shape, rows):
    """Of each batch's mean loss, absolute weight by weight, the mean over batches; 1e-3, since
    sums are in another order and products are small differences."""
    expected = 0
    for batch in first_batches(rows):
        gradient = jax.grad(nats_per_token)(ranked_params, ranked_shape, rows, batch)
        ffn = [
            np.abs(ranked_params["blocks"]["ffn"][name] * gradient["blocks"]["ffn"][name])
            for name in ("gate", "up", "down", "series_scale", "series_bias")
        ]
        axes = (1, 1, 2, 1, 1)
        expected += sum(x.sum(axis) for x, axis in zip(ffn, axes, strict=True)) / 2
    np.testing.assert_allclose(found["taylor"].arrays["ffn"], expected, rtol=1e-3, atol=1e-6)


def test_activation_is_what_a_structure_puts_out(found, ranked_params, ranked_shape, rows):
    """By hand for the first layer, whose input is the embedding."""
    expected, squares = 0, 0
    block = jax.tree.map(lambda leaf: leaf[0], ranked_params["blocks"])
    for batch in first_batches(rows):
        inputs = read_marks(batch, rows.begin_id, rows.end_id).inputs
        x_btd = ranked_params["embedding"]["table"][inputs]
        square_bt1 = np.mean(np.square(x_btd), -1, keepdims=True)
        normed = x_btd / np.sqrt(square_bt1 + 1e-5) * block["attention_norm"]["scale"]
        inner = jax.nn.gelu(normed @ block["shortcut"]["down"], approximate=True)
        expected += np.abs(inner).mean((0, 1)) / 2
        squares += np.square(x_btd).mean((0, 1)) / 2
    arrays = found["activation"].arrays
    np.testing.assert_allclose(arrays["bottleneck"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(arrays["square/attention_norm"][0], squares, rtol=1e-4)
    assert arrays["ffn"].shape == (2, 48) and (arrays["ffn"] > 0).all()
    groups = arrays["heads"].reshape(2, 2, 2).sum(-1)
    np.testing.assert_allclose(arrays["kv_heads"], groups, rtol=1e-6)


def test_a_skipped_layer_is_one_that_is_not_there(found, ranked_params, ranked_shape, rows):
    """The rise of the held-out loss, against models that never had the layer."""
    held_out = [batch["rows"] for batch in itertools.islice(held_out_batches(rows, 8), 2)]
    whole = read_marks(np.concatenate(held_out), rows.begin_id, rows.end_id).weights.sum()

    def loss(layers):
        shape = dataclasses.replace(ranked_shape, depth=len(layers))
        params = select_layers(ranked_params, layers)
        return nats_per_token(params, shape, rows, np.concatenate(held_out))

    assert whole > 100
    base = loss([0, 1])
    rises = [loss([1]) - base, loss([0]) - base]
    arrays = found["taylor"].arrays
    np.testing.assert_allclose(arrays["skip_1"], rises, atol=1e-4)
    assert "skip_2" not in arrays, "nothing would be left"
    assert (arrays["influence"] > 0).all() and arrays["influence"].shape == (2,)


@pytest.mark.pods
def test_the_layout_changes_nothing(teacher, rows, small, cut_found, tmp_path):
    """Eight devices in two parts a batch, or one device that takes it whole; the tolerance is
    that of float32 sums in another order, for trained logits what Adam makes of it. Of the other
    methods, what eight devices find is compared above with what one computes by hand."""
    one = Hardware(data=1, fsdp=1, tensor=1, per_device_batch=8)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    eight, _ = cut_found("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda *_: mesh)
        single = rank(teacher, tmp_path / "one", rows, one, method="learned", model=small)
    assert eight.about["layers"] == single.about["layers"]
    for name, array in single.arrays.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(eight.arrays[name], array, atol=2e-3 * scale, err_msg=name)


@pytest.mark.pods
def test_two_processes_rank_alike(teacher, rows, small, cut_found, tmp_path):
    """From the command line, four devices each, and one folder for both."""
    bindings = {f"ModelShape.{name}": value for name, value in vars(small).items()}
    bindings |= {f"Hardware.{name}": value for name, value in vars(EIGHT).items()}
    bindings |= {f"LayerChoice.{name}": getattr(CHOICE, name) for name in ("first", "last")}
    bindings |= {f"MaskTraining.{name}": getattr(FEW, name) for name in ("steps", "save_every")}
    settings = {"teacher": teacher, "dataset": rows.path, "workdir": tmp_path / "two"}
    settings |= {"method": "learned", "calibration_batches": 2, "batch_size": 8}
    settings |= {"output_grams": True}
    bindings |= {f"rank_teacher.{name}": value for name, value in settings.items()}
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    processes = start_together(
        [sys.executable, "-m", "pangu_tiny", "rank-teacher", *flags], tmp_path
    )
    codes = [process.wait() for process in processes]
    logs = [(tmp_path / f"log{index}").read_text() for index in (0, 1)]
    assert codes == [0, 0], logs[0]
    for label in ("layers skipped", "learned masks", "output grams"):
        assert label in logs[0] and label not in logs[1], "progress is shown once"
    assert "learned masks: 100%" in logs[0], "the last step counts too"
    expected, folder = cut_found("learned")
    found = Importance.open(str(tmp_path / "two"))
    assert found.about["layers"] == expected.about["layers"]
    for name, array in expected.arrays.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(found.arrays[name], array, atol=2e-3 * scale, err_msg=name)
    grams = sorted(epath.Path(folder).glob("gram_*"))
    assert len(grams) == 2
    for path in grams:
        one, two = np.load(path), np.load(tmp_path / "two" / path.name)
        np.testing.assert_allclose(two, one, atol=1e-5 * np.abs(one).max(), err_msg=path.name)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize(("method", "writes"), [("taylor", 5), ("learned", 9)])
def test_an_interrupted_ranking_goes_on(teacher, rows, small, cut_found, method, writes, tmp_path):
    """Stopped after so many saved states: the same bits as without, and what was measured is not
    measured again."""
    whole, _ = cut_found(method)
    count = itertools.count(1)

    def write(path, arrays):
        write_arrays(path, arrays)
        if next(count) == writes:
            raise _Interrupted

    write_arrays = measure.write_arrays
    with pytest.MonkeyPatch.context() as patch:
        for module in (measure, calibration):
            patch.setattr(module, "write_arrays", write)
        with pytest.raises(_Interrupted):
            rank(teacher, tmp_path / "cut", rows, method=method, model=small)
    with pytest.raises(UserError, match="that rank-teacher finished"):
        Importance.open(str(tmp_path / "cut"))
    done = [path.name for path in (tmp_path / "cut").glob("partial_*")]
    assert "partial_layers.npz" in done
    again = rank(teacher, tmp_path / "cut", rows, method=method, model=small)
    assert again.arrays.keys() == whole.arrays.keys()
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array, name)
    assert not list((tmp_path / "cut").glob("partial_*"))


def test_layers_are_chosen_first(teacher, small, cut_found, tmp_path):
    """All else is ranked on the teacher without the others, and is of no use for other layers."""
    found, importance = cut_found("taylor")
    kept = int(np.argmax(found.arrays["skip_1"]))
    assert found.about["layers"] == [kept] and found.arrays["ffn"].shape == (1, 48)
    listed = LayerChoice(rule="listed", layers=[1 - kept])
    with pytest.raises(UserError, match=rf"layers \[{1 - kept}\] are to stay, but importance was"):
        inherit(teacher, str(tmp_path / "no"), listed, small, importance=importance)
    cuts = inherit(teacher, str(tmp_path / "yes"), CHOICE, small, importance=importance)
    assert cuts.layers == [kept]
    best = np.argsort(-found.arrays["ffn"][0])[:32]
    assert cuts.blocks[0]["ffn"] == sorted(best)
    assert cuts.embed == sorted(
        np.argsort(-(found.arrays["embed"][0] + found.arrays["embed_outside"]))[:24]
    )


def test_learned_is_for_its_shape(teacher, small, cut_found, tmp_path):
    other = dataclasses.replace(small, ffn_width=16)
    _, importance = cut_found("learned")
    with pytest.raises(UserError, match="another shape: ffn_width is 32 there, 16 here"):
        inherit(teacher, str(tmp_path / "a"), CHOICE, other, importance=importance)
    with pytest.raises(UserError, match=r"rank_teacher\.kv = 'drop', inherit\.kv is 'repeat'"):
        repeated = dataclasses.replace(small, kv_heads=2)
        inherit(teacher, str(tmp_path / "b"), CHOICE, repeated, importance=importance, kv="repeat")
    inherit(teacher, str(tmp_path / "c"), CHOICE, other, importance=importance, as_ranking=True)


def test_without_a_dataset(teacher, ranked_shape, tmp_path):
    found = rank(teacher, tmp_path / "l2", None, method="l2")
    assert "skip_1" not in found.arrays and found.squares([0, 1]) is None
    assert (tmp_path / "l2" / "report.html").exists()
    for method in ("taylor", "activation"):
        with pytest.raises(UserError, match="dataset; without one, choose l1"):
            rank(teacher, tmp_path / "no", None, method=method)
    shape = dataclasses.replace(ranked_shape, depth=1)
    with pytest.raises(UserError, match="choose 'even' or 'listed'"):
        rank(teacher, tmp_path / "no", None, method="l1", model=shape)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "magic"}, "method is 'magic', expected one of l1, l2, taylor"),
        ({"method": "learned"}, "needs the shape to cut: bind ModelShape"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"calibration_batches": 0}, "calibration_batches is 0, expected at least 1"),
        ({"batch_size": 6}, "rank_teacher.batch_size 6 is not divisible by"),
    ],
)
def test_bad_settings(teacher, rows, changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        rank(teacher, tmp_path / "no", rows, **changes)
    assert not (tmp_path / "no").exists()


def test_a_shape_that_cannot_be_cut_is_refused_before_it_is_ranked(teacher, rows, small, tmp_path):
    for changes, said in (
        ({"width": 40}, "width is 40, the teacher has only 32"),
        ({"head_dim": 4}, "head_dim is 4, the teacher has 8"),
        ({"depth": 3}, "depth is 3, the teacher has only 2"),
    ):
        with pytest.raises(UserError, match=said):
            rank(teacher, tmp_path / "no", rows, model=dataclasses.replace(small, **changes))
    with pytest.raises(UserError, match="first 2 and last 0 are more than the 1 layers"):
        rank(teacher, tmp_path / "no", rows, choice=LayerChoice(first=2, last=0), model=small)
    assert not (tmp_path / "no").exists()


def test_nothing_held_out(teacher, small, tokenizer_of_rows, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer_of_rows[1])
    path = prepare(
        tmp_path, vocab_size=None, tokenizer=str(tmp_path / "t.model"), held_out_fraction=0.0
    )
    bare = TokenDataset.open(path)
    with pytest.raises(UserError, match="score = 'skip_1' needs held-out rows"):
        rank(teacher, tmp_path / "no", bare, model=small)


@pytest.mark.parametrize("method", ["l1", "taylor"])
def test_weights_that_are_not_finite(ranked_shape, ranked_params, tokenizer_of_rows, rows, method, tmp_path):  # fmt: skip  # noqa: E501
    blocks = dict(ranked_params["blocks"])
    blocks["ffn"] = blocks["ffn"] | {"up": blocks["ffn"]["up"].at[0, 0, 0].set(np.nan)}
    params = {**ranked_params, "blocks": blocks}
    teacher = save(
        tmp_path / "t", ranked_shape, params, tokenizer=tokenizer_of_rows, sequence_length=32
    )
    with pytest.raises(UserError, match=r"cannot be ranked: .*ffn.* came out NaN or infinite"):
        rank(teacher, tmp_path / "no", rows, method=method)
    assert not (tmp_path / "no" / ARRAYS).exists()


def test_damaged_rankings(found, tmp_path):
    for about, said in (({"layers": []}, "has no 'teacher'"), ([], "holds a list")):
        found["l1"].write(epath.Path(tmp_path))
        (tmp_path / ABOUT).write_text(json.dumps(about))
        with pytest.raises(UserError, match=said):
            Importance.open(str(tmp_path))
    found["l1"].write(epath.Path(tmp_path))
    (tmp_path / ARRAYS).write_bytes((tmp_path / ARRAYS).read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        Importance.open(str(tmp_path))


def test_a_dataset_in_other_ids_is_refused(rows, ranked_shape, ranked_params, tmp_path):
    teacher = save(tmp_path / "t", ranked_shape, ranked_params, sequence_length=32)
    with pytest.raises(UserError, match="prepare the text in its own ids"):
        rank(teacher, tmp_path / "no", rows)
    short = (rows.tokenizer_digest, rows.tokenizer_bytes())
    teacher = save(tmp_path / "s", ranked_shape, ranked_params, tokenizer=short, sequence_length=16)
    with pytest.raises(UserError, match=r"rows of 32 targets, checkpoint .* takes 16"):
        rank(teacher, tmp_path / "no", rows)


def test_a_ranking_of_another_teacher_is_refused(
    found, teacher, tokenizer_of_rows, ranked_shape, ranked_params, tmp_path
):
    found["l1"].write(epath.Path(tmp_path))
    other = dataclasses.replace(ranked_shape, norm_eps=1e-4)
    path = save(tmp_path / "t", other, ranked_params, tokenizer=tokenizer_of_rows)
    with pytest.raises(UserError, match=r"is of teacher [0-9a-f]{12}, "):
        inherit(path, str(tmp_path / "no"), CHOICE, other, importance=str(tmp_path))
    (tmp_path / ARRAYS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Importance.open(str(tmp_path))


def test_choices_of_layers():
    scores = np.array([0.0, 5, 1, 4, 2, 3, 0])
    assert LayerChoice(first=1, last=1).choose(7, 4, scores) == [0, 1, 3, 6]
    assert LayerChoice(first=0, last=0).choose(7, 3, scores) == [1, 3, 5]
    assert LayerChoice(rule="even").choose(7, 3, None) == [0, 3, 6]
    assert LayerChoice(rule="even").choose(29, 21, None)[-1] == 28
    assert LayerChoice(rule="listed", layers=[1, 4]).choose(7, 2, None) == [1, 4]
    for depth in range(1, 30):
        assert len(set(LayerChoice(rule="even").choose(29, depth, None))) == depth


@pytest.mark.parametrize(
    ("depth", "settings", "kept"),
    [
        (1, {}, [0]),
        (2, {}, [0, 6]),
        (3, {}, [0, 1, 6]),
        (4, {}, [0, 1, 5, 6]),
        (5, {}, [0, 1, 3, 5, 6]),
        (3, {"first": 0}, [3, 5, 6]),
        (3, {"first": 3}, [0, 1, 2]),
        (3, {"last": 0}, [0, 1, 3]),
        (3, {"last": 3}, [4, 5, 6]),
        (3, {"last": 2}, [0, 5, 6]),
        (1, {"last": 1}, [6]),
    ],
    ids=str,
)
def test_ends_that_are_not_given_fit_the_depth(depth, settings, kept):
    """The middle layer has the highest score, those at the ends the lowest."""
    scores = np.array([0.0, 0.1, 2, 5, 1, 0.1, 0])
    assert LayerChoice(**settings).choose(7, depth, scores) == kept


def test_a_default_is_what_it_comes_to(teacher, ranked_shape, tmp_path):
    """The same ranking goes on, whether its ends were given or not; no other does. (Where all
    layers stay, it needs no dataset.)"""

    def ranked(**ends):
        choice = LayerChoice(**ends)
        return rank(teacher, tmp_path, None, method="l1", model=ranked_shape, choice=choice)

    assert ranked().about["layers"] == [0, 1]
    ranked(first=1, last=1)
    with pytest.raises(UserError, match=r"layer_choice\.first is 1 there, 2 here"):
        ranked(first=2, last=0)


def test_a_window_counts_for_all_layers_in_it():
    """Skipping layers 1 and 2 together costs 6: 3 for each."""
    np.testing.assert_allclose(window_scores(np.array([0.0, 6, 0]), 2), [0, 1.5, 1.5, 0])
    np.testing.assert_allclose(window_scores(np.array([1.0, 2, 3]), 1), [1, 2, 3])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "best"}, "rule is 'best', expected one of importance"),
        ({"first": -1}, "first is -1, expected at least 0"),
        ({"score": "skip_4"}, "score is 'skip_4', expected one of skip_1"),
        ({"layers": [1]}, "layers and rule = 'listed' go together"),
        ({"rule": "listed"}, "layers and rule = 'listed' go together"),
    ],
)
def test_bad_choices(settings, said):
    with pytest.raises(UserError, match=said):
        LayerChoice(**settings)


def test_choices_that_cannot_be_made():
    for settings, said in (
        ({"first": 2, "last": 2}, "first 2 and last 2 are more than the 3 layers"),
        ({"first": 4}, "first 4 and last 0 are more than the 3 layers"),
        ({"last": 4}, "first 0 and last 4 are more than the 3 layers"),
    ):
        with pytest.raises(UserError, match=said):
            LayerChoice(**settings).choose(7, 3, np.zeros(7))
    with pytest.raises(UserError, match=r"\[4, 1\], expected 2 layers from 0 to 6, ascending"):
        LayerChoice(rule="listed", layers=[4, 1]).choose(7, 2, None)
    with pytest.raises(UserError, match="depth is 8, but the teacher has 7 layers"):
        LayerChoice().choose(7, 8, np.zeros(7))
