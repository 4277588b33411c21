"""A cut is exact: the small model computes what the teacher does without what is gone.

Tolerance: logits are of size one to ten and computed in float32 by sums in another order, where
1e-5 of their size is a few units in the last place; a structure too many or too few shows at 1e-2.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_params
from teachers import KINDS, PLAIN, SMALLER, jit_logits, masked, random_scores, save

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.errors import UserError
from pangu_tiny.inherit.cut_list import CutList, plan
from pangu_tiny.inherit.cutter import Cutter
from pangu_tiny.inherit.inherit import inherit
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.model.decoder import Decoder

IDS = jnp.asarray(np.random.default_rng(3).integers(0, 20, (2, 24)))
EVEN = LayerChoice(rule="even")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Shape, parameters and path of a teacher of each kind."""
    found = {}
    for kind, shape in KINDS.items():
        params = random_params(shape)
        found[kind] = shape, params, save(tmp_path_factory.mktemp("teacher"), shape, params)
    return found


def close(found, expected):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=0)


def cut_logits(cutter, ids=IDS):
    """Of the small model, in memory."""
    flat = {}
    for name, layer, value in cutter.parts():
        flat.setdefault(name, []).append(value)
        assert layer in (None, len(flat[name]) - 1)
    leaves = {
        name: np.stack(parts) if name.startswith("blocks/") else parts[0]
        for name, parts in flat.items()
    }
    params = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(leaf)
    return jit_logits(Decoder(cutter.cuts.model), params, ids)


def smaller(shape, **changes):
    """A target for a teacher of that shape, cut in every axis."""
    small = dataclasses.replace(shape, **{**SMALLER, **changes})
    return small if shape.kv_heads < shape.heads else dataclasses.replace(small, kv_heads=4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_cut_has_the_same_bits(teachers, kind, tmp_path):
    shape, params, teacher = teachers[kind]
    inherit(teacher, str(tmp_path / "same"), EVEN, shape)
    found = flatten_dict(open_checkpoint(str(tmp_path / "same")).params(), sep="/")
    padding = {"embedding/table": np.s_[: shape.vocab_size], "head/kernel": np.s_[:, :50]}
    for name, leaf in flatten_dict(params, sep="/").items():
        real = padding.get(name, np.s_[:])
        np.testing.assert_array_equal(found[name][real], leaf[real], name, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_is_the_masked_teacher(teachers, kind):
    """In depth, width, heads, groups, neurons, bottleneck and vocabulary at once; the masked norm
    takes its mean over the channels that are kept."""
    shape, params, teacher = teachers[kind]
    opened = open_checkpoint(teacher)
    vocabulary = [5, 1, 2, *range(20, 42)]
    model = smaller(shape, vocab_size=len(vocabulary))
    scores = random_scores(shape, 3)
    cuts = plan(shape, opened.digest, model, [0, 2, 3], scores, vocabulary=vocabulary)
    cuts.check(shape)
    silenced, decoder = masked(params, shape, cuts)
    old_ids = jnp.asarray(vocabulary)[IDS]
    expected = jit_logits(decoder, silenced, old_ids)[..., jnp.asarray(vocabulary)]
    close(cut_logits(Cutter(opened, cuts)), expected)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_list_is_the_masked_teacher(teachers, data):
    """Cut lists that no ranking made: channels and neurons in any order."""
    shape, params, teacher = teachers["pangu"]
    opened = open_checkpoint(teacher)
    draw = lambda n, k: data.draw(st.permutations(range(n)))[:k]  # noqa: E731
    layers = sorted(draw(4, 2))
    blocks = []
    for _ in layers:
        groups = draw(3, 2)
        heads = [2 * group + place for group in groups for place in draw(2, 1)]
        block = {"kv_heads": groups, "heads": heads, "ffn": draw(40, 7)}
        blocks.append({**block, "bottleneck": draw(6, 2)})
    model = dataclasses.replace(shape, depth=2, width=8, heads=2, kv_heads=2, ffn_width=7)
    cuts = CutList(opened.digest, model, layers, draw(24, 8), blocks)
    cuts.check(shape)
    silenced, decoder = masked(params, shape, cuts)
    close(cut_logits(Cutter(opened, cuts)), jit_logits(decoder, silenced, IDS))


def test_a_vocabulary_cut_has_the_teachers_logits(teachers):
    shape, params, teacher = teachers["grouped"]
    vocabulary = [3, 0, 1, *range(10, 40)]
    model = dataclasses.replace(shape, vocab_size=len(vocabulary))
    opened = open_checkpoint(teacher)
    cuts = plan(shape, opened.digest, model, [0, 1, 2, 3], None, vocabulary=vocabulary)
    old = jnp.asarray(vocabulary)
    expected = jit_logits(Decoder(shape), params, old[IDS])[..., old]
    close(cut_logits(Cutter(opened, cuts)), expected)


def test_a_trained_teacher(real_data, tmp_path):
    """stories260k, grouped and tied, imported and cut in every axis."""
    from pangu_tiny.convert.import_hf import import_hf

    teacher = str(tmp_path / "teacher")
    import_hf(str(real_data / "checkpoints" / "stories260k"), teacher)
    opened = open_checkpoint(teacher)
    shape, params = opened.shape, opened.params()
    model = dataclasses.replace(
        shape, depth=3, width=40, heads=4, kv_heads=2, ffn_width=100, vocab_size=300
    )
    vocabulary = list(range(200, 500))
    scores = random_scores(shape, 3)
    cuts = plan(shape, opened.digest, model, [0, 1, 4], scores, vocabulary=vocabulary)
    cuts.check(shape)
    silenced, decoder = masked(params, shape, cuts)
    expected = jit_logits(decoder, silenced, jnp.asarray(vocabulary)[IDS])
    close(cut_logits(Cutter(opened, cuts)), expected[..., 200:500])


def test_every_query_head_can_have_its_own_key_value_head(teachers):
    shape, params, teacher = teachers["grouped"]
    opened = open_checkpoint(teacher)
    model = dataclasses.replace(shape, kv_heads=6)
    cuts = plan(shape, opened.digest, model, [0, 1, 2, 3], None, kv="repeat")
    cuts.check(shape)
    close(cut_logits(Cutter(opened, cuts)), jit_logits(Decoder(shape), params, IDS))
    fewer = dataclasses.replace(shape, heads=4, kv_heads=4)
    cuts = plan(shape, opened.digest, fewer, [0, 1, 2, 3], random_scores(shape, 4), kv="repeat")
    cuts.check(shape)
    silenced, decoder = masked(params, shape, cuts)
    close(cut_logits(Cutter(opened, cuts)), jit_logits(decoder, silenced, IDS))


def test_merged_key_value_heads_are_means(teachers):
    """6 → 3 groups: equal to the teacher whose neighbours' keys and values are averaged."""
    shape, params, teacher = teachers["all kv heads"]
    opened = open_checkpoint(teacher)
    model = dataclasses.replace(shape, kv_heads=3)
    cuts = plan(shape, opened.digest, model, [0, 1, 2, 3], None, kv="merge")
    cuts.check(shape)
    attention = dict(params["blocks"]["attention"])
    for name in ("key", "value"):
        pairs = attention[name].reshape(4, 24, 3, 2, 6).mean(axis=3, keepdims=True)
        attention[name] = jnp.repeat(pairs, 2, axis=3).reshape(4, 24, 6, 6)
    averaged = {**params, "blocks": {**params["blocks"], "attention": attention}}
    close(cut_logits(Cutter(opened, cuts)), jit_logits(Decoder(shape), averaged, IDS))


@pytest.mark.parametrize("terms", [2, 3])
def test_modules_that_the_teacher_lacks_start_neutral(teachers, terms):
    """With two terms to the letter; with more, which must differ, within what a fresh model has."""
    shape, params, teacher = teachers["grouped"]
    opened = open_checkpoint(teacher)
    model = dataclasses.replace(shape, series_terms=terms, shortcut_ratio=4)
    cutter = Cutter(opened, plan(shape, opened.digest, model, [0, 1, 2, 3], None))
    found, expected = cut_logits(cutter), jit_logits(Decoder(shape), params, IDS)
    if terms == 2:
        close(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=0.1)
    fresh = {name: value for name, layer, value in cutter.parts() if layer == 0}
    assert np.std(fresh["blocks/shortcut/down"]) > 0.01, "both zero would never learn"
    other = {name: value for name, layer, value in cutter.parts() if layer == 1}
    assert (other["blocks/shortcut/down"] != fresh["blocks/shortcut/down"]).all()


def test_a_shortcut_can_go(teachers):
    shape, params, teacher = teachers["pangu"]
    opened = open_checkpoint(teacher)
    model = dataclasses.replace(shape, shortcut_ratio=0)
    cutter = Cutter(opened, plan(shape, opened.digest, model, [0, 1, 2, 3], None))
    silenced, decoder = masked(params, shape, cutter.cuts)
    close(cut_logits(cutter), jit_logits(decoder, silenced, IDS))
    assert "blocks/shortcut/up" in cutter.manifest()["not_taken"]


def test_tied_and_untied(teachers, tmp_path):
    shape, params, teacher = teachers["tied"]
    opened = open_checkpoint(teacher)
    untied = dataclasses.replace(shape, tied=False)
    cutter = Cutter(opened, plan(shape, opened.digest, untied, [0, 1, 2, 3], None))
    close(cut_logits(cutter), jit_logits(Decoder(shape), params, IDS))
    assert cutter.manifest()["leaves"]["head/kernel"]["from"] == "embedding/table"

    shape, params, teacher = teachers["grouped"]
    tied = dataclasses.replace(shape, tied=True)
    with pytest.raises(UserError, match=r"inherit.tie = 'embedding' or 'head'"):
        inherit(teacher, str(tmp_path / "tied"), EVEN, tied)
    for tie, table in (
        ("embedding", params["embedding"]["table"]),
        ("head", params["head"]["kernel"].T),
    ):
        inherit(teacher, str(tmp_path / tie), EVEN, tied, tie=tie)
        found = open_checkpoint(str(tmp_path / tie)).params()
        np.testing.assert_array_equal(found["embedding"]["table"][:50], table[:50])
        assert "head" not in found
    with pytest.raises(UserError, match=r"tie is 'head', but no two matrices become one"):
        inherit(teacher, str(tmp_path / "no"), EVEN, shape, tie="head")


def test_rows_of_the_vocabulary_and_their_padding(teachers):
    shape, params, teacher = teachers["grouped"]
    opened = open_checkpoint(teacher)
    model = dataclasses.replace(shape, vocab_size=3)
    cuts = plan(shape, opened.digest, model, [0, 1, 2, 3], None, vocabulary=[7, 20, 0])
    cuts.check(shape)
    parts = {name: value for name, layer, value in Cutter(opened, cuts).parts() if layer is None}
    for table_vd, old_vd in (
        (parts["embedding/table"], params["embedding"]["table"]),
        (parts["head/kernel"].T, params["head"]["kernel"].T),
    ):
        assert table_vd.shape == (128, 24)
        np.testing.assert_array_equal(table_vd[:3], old_vd[np.array([7, 20, 0])])
        assert not table_vd[3:].any()


def test_calibrated_norms(teachers):
    """Each norm's weights carry what its mean changes by, from all channels to those kept."""
    shape, params, teacher = teachers["grouped"]
    opened = open_checkpoint(teacher)
    cuts = plan(shape, opened.digest, smaller(shape), [0, 1, 3], random_scores(shape, 3))
    random = np.random.default_rng(1)
    squares = {
        "final_norm/scale": random.random(24),
        "blocks/ffn_norm/scale": random.random((3, 24)),
    }
    cutter = Cutter(opened, cuts, squares=squares)
    parts = {(name, layer): value for name, layer, value in cutter.parts()}
    for (name, layer), square_d in (
        (("final_norm/scale", None), squares["final_norm/scale"]),
        (("blocks/ffn_norm/scale", 2), squares["blocks/ffn_norm/scale"][2]),
    ):
        scale = flatten_dict(params, sep="/")[name]
        scale = scale if layer is None else scale[3]
        ratio = np.sqrt(square_d[cuts.embed].mean() / square_d.mean())
        np.testing.assert_allclose(
            parts[name, layer], scale[np.array(cuts.embed)] * ratio, rtol=1e-6
        )
    untouched = params["blocks"]["attention_norm"]["scale"][3][np.array(cuts.embed)]
    np.testing.assert_array_equal(parts["blocks/attention_norm/scale", 2], untouched)


def test_the_manifest_accounts_for_every_leaf(teachers, tmp_path):
    shape, params, teacher = teachers["pangu"]
    target = dataclasses.replace(shape, depth=3, vocab_size=50)
    inherit(teacher, str(tmp_path / "small"), EVEN, target)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    small = flatten_dict(open_checkpoint(str(tmp_path / "small")).params(), sep="/")
    assert manifest["leaves"].keys() == small.keys() and manifest["not_taken"] == []
    for name, line in manifest["leaves"].items():
        assert tuple(line["after"]) == small[name].shape and line["from"] == name
        assert tuple(line["before"]) == flatten_dict(params, sep="/")[name].shape
        if name.startswith("blocks/"):
            assert line["layers"] == [0, 2, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_float_types(teachers, dtype, tmp_path):
    """A bfloat16 teacher gives a bfloat16 model, or one of the type that is asked for."""
    shape, params, _ = teachers["grouped"]
    teacher = save(tmp_path / "teacher", shape, params, dtype)
    inherit(teacher, str(tmp_path / "same"), EVEN, dataclasses.replace(shape, depth=2))
    inherit(
        teacher, str(tmp_path / "wide"), EVEN, dataclasses.replace(shape, depth=2), dtype="float32"
    )
    same, wide = (open_checkpoint(str(tmp_path / name)) for name in ("same", "wide"))
    assert same.dtype == dtype and wide.dtype == "float32"
    gate = params["blocks"]["ffn"]["gate"][jnp.array([0, 3])].astype(dtype).astype("float32")
    for found in (same, wide):
        np.testing.assert_array_equal(found.params()["blocks"]["ffn"]["gate"], gate)


def test_an_interrupted_cut_is_made_again(teachers, tmp_path, monkeypatch):
    shape, _, teacher = teachers["pangu"]
    target = dataclasses.replace(shape, depth=2)
    inherit(teacher, str(tmp_path / "whole"), EVEN, target)
    part = Cutter._part
    count = iter(range(100))

    def interrupted(self, name, layer):
        if next(count) == 9:
            raise KeyboardInterrupt
        return part(self, name, layer)

    with monkeypatch.context() as patch:
        patch.setattr(Cutter, "_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inherit(teacher, str(tmp_path / "cut"), EVEN, target)
    with pytest.raises(UserError, match="no checkpoint there"):
        open_checkpoint(str(tmp_path / "cut"))
    inherit(teacher, str(tmp_path / "cut"), EVEN, target)
    whole, again = (open_checkpoint(str(tmp_path / name)) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, again.params(), whole.params())
    assert again.digest == whole.digest


def test_an_edited_list(teachers, tmp_path):
    """cuts_only writes the list that a run without it takes; what is edited in it is done."""
    shape, params, teacher = teachers["grouped"]
    target = dataclasses.replace(shape, depth=3)
    first = inherit(teacher, str(tmp_path / "list"), EVEN, target, cuts_only=True)
    assert not (tmp_path / "list" / "checkpoints").exists()
    assert CutList.read(str(tmp_path / "list")) == first
    file = tmp_path / "list" / "cuts.json"
    text = file.read_text()
    assert '"layers": [0, 2, 3]' in text
    file.write_text(text.replace('"layers": [0, 2, 3]', '"layers": [0, 1, 3]'))
    inherit(teacher, str(tmp_path / "edited"), EVEN, cuts=str(file))
    found = open_checkpoint(str(tmp_path / "edited")).params()
    np.testing.assert_array_equal(
        found["blocks"]["ffn"]["up"], params["blocks"]["ffn"]["up"][jnp.array([0, 1, 3])]
    )


def test_what_was_edited_is_not_lost(teachers, tmp_path):
    """The same command without cuts_only would write the list anew."""
    shape, _, teacher = teachers["grouped"]
    workdir, target = str(tmp_path / "list"), dataclasses.replace(shape, depth=3)
    inherit(teacher, workdir, EVEN, target, cuts_only=True)
    file = tmp_path / "list" / "cuts.json"
    edited = file.read_text().replace("[0, 2, 3]", "[0, 1, 3]")
    file.write_text(edited)
    with pytest.raises(UserError, match=r"was edited: give it as inherit\.cuts"):
        inherit(teacher, workdir, EVEN, target)
    assert file.read_text() == edited


def test_values_too_large_for_the_type(tmp_path):
    params = random_params(PLAIN)
    params["blocks"]["ffn"]["up"] = params["blocks"]["ffn"]["up"].at[2, 3, 4].set(1e5)
    teacher = save(tmp_path / "teacher", PLAIN, params)
    with pytest.raises(UserError, match="blocks/ffn/up, layer 2, has 1 values too large for dtype"):
        inherit(teacher, str(tmp_path / "small"), EVEN, PLAIN, dtype="float16")
    assert not list((tmp_path / "small" / "checkpoints").iterdir())


def test_more_terms_than_the_teacher_has(teachers):
    """The first new one is silent, those after it differ, or they would never separate."""
    shape, params, teacher = teachers["pangu"]
    opened = open_checkpoint(teacher)
    model = dataclasses.replace(shape, series_terms=4)
    cutter = Cutter(opened, plan(shape, opened.digest, model, [0, 1, 2, 3], None))
    parts = {(name, layer): value for name, layer, value in cutter.parts()}
    scale_nf = parts["blocks/ffn/series_scale", 1]
    np.testing.assert_array_equal(scale_nf[:2], params["blocks"]["ffn"]["series_scale"][1])
    assert not np.allclose(scale_nf[2], scale_nf[3])
    np.testing.assert_allclose(
        cut_logits(cutter), jit_logits(Decoder(shape), params, IDS), atol=0.1
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f["layers"].__setitem__(0, 9), r"layers is \[9, 2, 3\], expected 3 layers"),
        (lambda f: f["layers"].__setitem__(0, 2), r"layers is \[2, 2, 3\]"),
        (lambda f: f["embed"].__setitem__(0, 24), r"embed has 24, expected numbers from 0 to 23"),
        (lambda f: f["embed"].__setitem__(0, True), r"embed is not a list\[int\]"),
        (lambda f: f.__setitem__("layers", None), r"layers is not a list\[int\]"),
        (lambda f: f.__setitem__("blocks", [1, 2, 3]), r"blocks is not a list"),
        (lambda f: f.__setitem__("vocabulary", 5), r"vocabulary is not a "),
        (lambda f: f.__setitem__("teacher", None), r"teacher is not a str"),
        (lambda f: f.__setitem__("repeated", "x"), r"repeated is not a bool"),
        (lambda f: f["model"].__setitem__("tied", "no"), r"model.tied is not a bool"),
        (lambda f: f["model"].__setitem__("rope_theta", 5e5), r"rope_theta is 500000.0, the"),
        (lambda f: f["model"].__setitem__("head_dim", 4), r"head_dim is 4, the teacher has 6"),
        (lambda f: f["blocks"][0]["ffn"].__setitem__(0, []), r"ffn has a list in it, expected num"),
        (lambda f: f["blocks"][0]["heads"].__setitem__(0, [0]), r"heads has a list in it"),
        (lambda f: f["embed"].__setitem__(0, 5), r"embed has 5 twice"),
        (lambda f: f["embed"].pop(), r"embed has 23 entries, expected 24"),
        (lambda f: f["blocks"].pop(), r"2 blocks, expected 3"),
        (lambda f: f["blocks"][1].pop("ffn"), r"blocks\[1\] has kv_heads, heads, bottleneck"),
        (lambda f: f["blocks"][1]["ffn"].__setitem__(3, -1), r"blocks\[1\].ffn has -1, expected"),
        (lambda f: f["blocks"][0]["heads"].reverse(), r"\[0\] is 5, which reads key-value head 2"),
        (lambda f: f["blocks"][0]["kv_heads"].__setitem__(0, 1), r"kv_heads has 1 twice"),
        (lambda f: f.__setitem__("teacher", "0" * 64), r"are of teacher 000000000000, .* is "),
        (lambda f: f.__setitem__("format", 2), r"has format 2, expected 1"),
        (lambda f: f.pop("layers"), r"is not what inherit writes"),
        (lambda f: f["model"].__setitem__("heads", 5), r"heads 5 is not divisible by"),
        (lambda f: f.__setitem__("vocabulary", [1, 2]), r"vocabulary has 2, expected 50 rows"),
    ],
)  # fmt: skip
def test_an_inconsistent_list_is_refused(teachers, change, said, tmp_path):
    shape, _, teacher = teachers["grouped"]
    target = dataclasses.replace(shape, depth=3)
    inherit(teacher, str(tmp_path / "list"), EVEN, target, cuts_only=True)
    file = tmp_path / "list" / "cuts.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=said):
        inherit(teacher, str(tmp_path / "small"), EVEN, cuts=str(file))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 5}, "depth is 5, but the teacher has 4 layers"),
        ({"width": 32}, "width is 32, the teacher has only 24"),
        ({"ffn_width": 41}, "ffn_width is 41, the teacher has only 40"),
        ({"heads": 9}, "heads is 9, the teacher has only 6"),
        ({"kv_heads": 6}, "6 key-value heads with 1 query heads each, .* 3 with 2.*kv = 'repeat'"),
        ({"heads": 3, "kv_heads": 1}, "1 key-value heads with 3 query heads each"),
        ({"head_dim": 4}, "head_dim is 4, the teacher has 6, expected the same"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05, the teacher has 0.001"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, the teacher has 10000.0"),
        ({"width": 16}, "16 of 24 embed: which ones stay needs inherit.importance"),
        ({"vocab_size": 40}, "vocab_size is 40, the teacher has 50: give inherit.tokenizer"),
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_cut_is_refused(teachers, changes, said, tmp_path):
    shape, _, teacher = teachers["grouped"]
    with pytest.raises(UserError, match=said):
        inherit(teacher, str(tmp_path / "small"), EVEN, dataclasses.replace(shape, **changes))
    assert not (tmp_path / "small").exists()


def test_fewer_terms_are_refused(teachers, tmp_path):
    shape, _, teacher = teachers["pangu"]
    with pytest.raises(UserError, match="series_terms is 1, the teacher has 2"):
        inherit(teacher, str(tmp_path / "a"), EVEN, dataclasses.replace(shape, series_terms=1))
    with pytest.raises(UserError, match="a shortcut of 12 channels, the teacher has only 6"):
        inherit(teacher, str(tmp_path / "b"), EVEN, dataclasses.replace(shape, shortcut_ratio=2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    params = random_params(PLAIN)
    up = params["blocks"]["ffn"]["up"].at[2, 3, 4].set(value)
    params["blocks"]["ffn"]["up"] = up
    teacher = save(tmp_path / "teacher", PLAIN, params)
    with pytest.raises(UserError, match="blocks/ffn/up, layer 2 has 1 values that are NaN or inf"):
        inherit(teacher, str(tmp_path / "small"), EVEN, PLAIN)
    with pytest.raises(UserError, match="no checkpoint there"):
        open_checkpoint(str(tmp_path / "small"))
