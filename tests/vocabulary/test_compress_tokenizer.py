"""compress-tokenizer: the size that was asked, no dead piece, the same text, the map between."""

import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.text.documents import held_out
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer
from pangu_tiny.vocabulary import huggingface, prune
from pangu_tiny.vocabulary.count_tokens import count_tokens
from pangu_tiny.vocabulary.counts import read_counts
from pangu_tiny.vocabulary.pieces import Vocabulary

STRANGE = [
    "",
    "\u2581",
    "a\0b",
    "\x01\x7f",
    "🙂世界 \n\t  x ",
    "größter there",
    "<s></s><unk>",
    " ",
]
SPACES = ["  a  b ", "a \u2581", "\u2581\u2581 a", " \n a \n ", "a \u2581 b\n", "   "]
"""At both ends, in runs, written as U+2581, and beside line ends, which are none."""


@pytest.fixture(scope="module", params=["flow", "unused", "paper"])
def cut(request, compress, tmp_path_factory):
    """(method, report, compact tokenizer, folder) at 400 of 600 pieces."""
    workdir = tmp_path_factory.mktemp(request.param) / "w"
    return request.param, *compress(workdir, vocab_size=400, method=request.param), workdir


def test_size_marks_and_bytes(cut, big):
    method, found, compact, _ = cut
    assert compact.vocab_size == found["size"] == 400
    assert (compact.pieces > 400) == (method == "unused")
    for kind in (proto.BYTE, proto.CONTROL, proto.UNKNOWN):
        assert (compact.kinds == kind).sum() == (big.kinds == kind).sum()
    for mark in ("begin_id", "end_id", "unknown_id"):
        assert compact.piece(getattr(compact, mark)) == big.piece(getattr(big, mark))


def test_every_text_decodes_as_before(cut, big, many_texts):
    compact = cut[2]
    for text in (*many_texts, *STRANGE):
        ids = compact.encode(text)
        assert max(ids, default=0) < 400
        assert compact.decode(ids) == big.decode(big.encode(text))


def test_only_the_paper_kills_pieces(cut):
    method, found, compact, _ = cut
    vocabulary = Vocabulary.of(compact)
    dead = (vocabulary.unreachable & (vocabulary.kinds != proto.UNUSED)).sum()
    assert found["compact"]["dead"] == dead
    assert (dead > 0) == (method == "paper")


@hypothesis.settings(deadline=None)
@hypothesis.given(times=st.lists(st.integers(0, 9), min_size=9, max_size=9))
def test_flow_is_the_best_of_all_closed_sets(big, times):
    """Against every set of as many pieces that leaves no dead one, where each piece that went is
    its parts, and those that went too are theirs."""
    made = ("an", "nd", "and", "da", "dan", "anan", "andand", "ananda", "nda")
    base = [i for i, kind in enumerate(big.kinds) if kind != proto.NORMAL]
    base += [Vocabulary.of(big).ids[c] for c in "and\u2581"]
    model = type(big.proto).FromString(big.select(base).model_bytes)
    for rank, piece in enumerate(made):
        model.pieces.add(piece=piece, score=-rank, type=proto.NORMAL)
    vocabulary = Vocabulary.of(Tokenizer(model.SerializeToString()))
    free = range(len(base), len(vocabulary.pieces))
    alive = [i for i in free if not vocabulary.unreachable[i]]
    emitted = np.zeros(len(vocabulary.pieces), int)
    emitted[alive] = times[: len(alive)]
    keep = ~np.isin(np.arange(len(vocabulary.pieces)), alive)

    def cost(out):
        def tokens(i):
            return sum(map(tokens, vocabulary.parts[i])) if i in out else 1

        return sum(emitted[i] * (tokens(i) - 1) for i in alive)

    def closed(out):
        return all(i in out for i in alive if set(vocabulary.parts[i]) & out)

    gone = prune.order("flow", vocabulary, emitted, keep).tolist()
    assert sorted(gone) == alive
    for count in range(len(alive) + 1):
        sets = map(set, itertools.combinations(alive, count))
        assert cost(set(gone[:count])) == min(cost(out) for out in sets if closed(out))


def test_methods_rank_as_they_should(compress, tmp_path, many_texts):
    """On the text that was counted: unused is the shortest, the paper's the longest."""
    lengths = {}
    for method in ("flow", "unused", "paper"):
        _, compact = compress(tmp_path / method, vocab_size=380, method=method)
        lengths[method] = sum(map(len, compact.encode_batch(many_texts)))
    assert lengths["unused"] <= lengths["flow"] < lengths["paper"]


def test_the_map_leads_both_ways(cut, big, many_texts):
    method, _, compact, workdir = cut
    found = json.loads((workdir / "id_map.json").read_text())
    assert (found["old_digest"], found["new_digest"]) == (big.digest, compact.digest)
    for new, old in enumerate(found["new_to_old"]):
        assert found["old_to_new"][old] == [new]
        assert compact.piece(new) == big.piece(old)
    for old, new in enumerate(found["old_to_new"]):
        assert compact.decode(new) == big.decode([old])
    mapped = [[n for i in big.encode(t) for n in found["old_to_new"][i]] for t in many_texts]
    again = [compact.encode(text) for text in many_texts]
    assert found["exact"] == (method == "unused")
    if found["exact"]:
        assert mapped == again


def test_hugging_face_gives_the_same_ids(cut, many_texts, tmp_path):
    import tokenizers

    method, found, compact, workdir = cut
    if method != "flow":
        reason = {"unused": "unused pieces", "paper": "merges characters that are no pieces"}
        assert reason[method] in found["huggingface_refused"]
        return
    file = str(workdir / "huggingface" / "tokenizer.json")
    other = tokenizers.Tokenizer.from_file(file)
    other.encode_special_tokens = True
    for text in (*many_texts, *STRANGE):
        assert other.encode(text, add_special_tokens=False).ids == compact.encode(text)
        assert other.decode(compact.encode(text)) == compact.decode(compact.encode(text))
    marked = tokenizers.Tokenizer.from_file(file).encode("there<s>").ids
    assert marked == [compact.begin_id, *compact.encode("there"), compact.begin_id]


def with_pieces(big, *pieces, **rules):
    """The tokenizer with more pieces (text, score, type), and other rules for text."""
    model = type(big.proto).FromString(big.model_bytes)
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    for name, value in rules.items():
        setattr(model.normalizer_spec, name, value)
    return Tokenizer(model.SerializeToString())


@pytest.mark.parametrize(
    ("pieces", "rules"),
    [
        ((("<x>", 0.0, proto.USER_DEFINED), ("[y]", 0.0, proto.USER_DEFINED)), {}),
        ((), {"add_dummy_prefix": True}),
        ((), {"remove_extra_whitespaces": True}),
        ((), {"remove_extra_whitespaces": True, "add_dummy_prefix": True}),
        # Overlapping pieces of equal score: the left one goes first, whatever its id.
        ((("dö", 5.0, proto.NORMAL), ("öd", 5.0, proto.NORMAL), ("tö", 5.0, proto.NORMAL)), {}),
    ],
)
def test_hugging_face_with_other_pieces_and_rules(big, many_texts, pieces, rules):
    import tokenizers

    tokenizer = with_pieces(big, *pieces, **rules)
    try:
        files = huggingface.export(tokenizer)
    except UserError as error:
        assert "overlap in a circle" in str(error)  # dö, öd
        tokenizer = with_pieces(big, *pieces[1:], **rules)
        files = huggingface.export(tokenizer)
    other = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    other.encode_special_tokens = True
    for text in (*many_texts[:100], *STRANGE, "a<x>the[y] <x>", "töd ödö ttödö", " <s>x", *SPACES):
        ids = tokenizer.encode(text)
        assert other.encode(text, add_special_tokens=False).ids == ids
        assert other.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("pieces", "rules", "reason"),
    [
        ((("a\u2581b", 0.0, proto.USER_DEFINED),), {}, "holds a space"),
        ((("xy", 0.0, proto.UNUSED), ("xyz", 0.0, proto.NORMAL)), {}, "unused pieces"),
        ((("<x>", 0.0, proto.USER_DEFINED),), {"add_dummy_prefix": True}, "put another"),
        ((("<x>", 0.0, proto.USER_DEFINED),), {"remove_extra_whitespaces": True}, "beside each"),
        ((), {"precompiled_charsmap": b"x"}, "normalises"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(big, pieces, rules, reason):
    with pytest.raises(UserError, match=reason):
        huggingface._check(*_loaded(big, pieces, rules))


def _loaded(big, pieces, rules):
    """Without SentencePiece reading a charsmap that is none."""
    tokenizer = with_pieces(big, *pieces)
    for name, value in rules.items():
        setattr(tokenizer.proto.normalizer_spec, name, value)
    return tokenizer, Vocabulary.of(tokenizer)


def test_report_accounts_for_everything(cut, big, many_texts):
    method, found, compact, workdir = cut
    texts = [text for text in many_texts if held_out(text, 0.2)]
    (entry,) = found["held_out"].values()
    assert entry["documents"] == len(texts)
    assert entry["tokens_before"] == sum(map(len, big.encode_batch(texts)))
    assert entry["tokens_after"] == sum(map(len, compact.encode_batch(texts)))
    row = next(row for row in found["trade_off"] if row["size"] == 400)
    assert row["this_tokens"] == entry["tokens_after"]
    assert row["coverage"] == pytest.approx(found["coverage"])
    page = (workdir / "report.html").read_text()
    assert "What was lost" in page
    assert method in page


@pytest.mark.parametrize("target", [{"coverage": 0.97}, {"embedding_share": 0.2}])
def test_other_targets(compress, tmp_path, big, big_counts, target):
    found, compact = compress(tmp_path / "w", **target)
    size = compact.vocab_size
    smaller, _ = compress(tmp_path / "s", vocab_size=size - 1)
    larger, _ = compress(tmp_path / "l", vocab_size=size + 1)
    if "coverage" in target:
        assert smaller["coverage"] < 0.97 <= found["coverage"]
        times = read_counts(big_counts, big).times
        kept = json.loads((tmp_path / "w" / "id_map.json").read_text())["new_to_old"]
        assert found["coverage"] == pytest.approx(times[kept].sum() / times.sum())
    else:
        shares = [r["parameters"]["share_after"] for r in (found, larger)]
        assert shares[0] <= 0.2 < shares[1]


def test_without_a_shape_the_report_says_nothing_of_parameters(compress, tmp_path, capsys):
    """The tokenizer and all other figures are the same; a share of nothing cannot be a target."""
    found, compact = compress(tmp_path / "a", vocab_size=400)
    capsys.readouterr()
    bare, same = compress(tmp_path / "b", vocab_size=400, model=None)
    assert same.digest == compact.digest
    for row, entry in zip(bare["trade_off"], found["trade_off"], strict=True):
        assert row == {name: x for name, x in entry.items() if name in row}
        assert entry.keys() - row.keys() == {"depth", "parameters", "share"}
    assert found.keys() - bare.keys() == {"parameters"}
    whole, page = ((tmp_path / name / "report.html").read_text() for name in "ab")
    said = capsys.readouterr().out
    shares = [f"{row['share']:.1%}<" for row in found["trade_off"]]
    for word in ("parameters", "embedding and head", "depth", *shares):
        assert word in whole
        assert word not in page and word not in said
    with pytest.raises(UserError, match=r"embedding_share is of a model's .* bind ModelShape"):
        compress(tmp_path / "c", embedding_share=0.2, model=None)
    with pytest.raises(UserError, match="holds another run: model is None there"):
        compress(tmp_path / "b", vocab_size=400)


def test_named_pieces_stay(compress, tmp_path, big):
    _, without = compress(tmp_path / "a", vocab_size=300)
    kept = {without.piece(i) for i in range(300)}
    wanted = next(p for p in Vocabulary.of(big).pieces[::-1] if len(p) > 3 and p not in kept)
    _, compact = compress(tmp_path / "b", vocab_size=300, keep=[wanted])
    assert wanted in Vocabulary.of(compact).pieces
    assert not compact.unreachable.any()
    with pytest.raises(UserError, match=r"keep names 'xyzzy', which is no piece"):
        compress(tmp_path / "c", vocab_size=300, keep=["xyzzy"])


def test_wrong_targets_are_named_and_nothing_is_written(
    compress, tmp_path, many_texts, write_jsonl
):
    for changes, message in (
        ({}, "has no target"),
        ({"vocab_size": 400, "coverage": 0.9}, "vocab_size and coverage, expected exactly one"),
        ({"vocab_size": 200}, r"is 200, expected at least 260 and at most 600"),
        ({"vocab_size": 601}, r"is 601, expected at least 260"),
        ({"coverage": 1.5}, "is 1.5, expected more than 0 and below 1"),
        ({"embedding_share": 0.01}, r"the 260 pieces that must be kept are"),
        ({"vocab_size": 400, "method": "best"}, "expected one of flow, unused, paper"),
    ):
        with pytest.raises(UserError, match=message):
            compress(tmp_path / "w", **changes)
    (tmp_path / "other.model").write_bytes(train_tokenizer(many_texts, 500).model_bytes)
    with pytest.raises(UserError, match="are of the tokenizer"):
        compress(tmp_path / "w", vocab_size=400, tokenizer=str(tmp_path / "other.model"))
    trained = next(text for text in many_texts if not held_out(text, 0.2))
    with pytest.raises(UserError, match="no held-out document"):
        compress(
            tmp_path / "w", vocab_size=400, text=write_jsonl(tmp_path / "one.jsonl", [trained])
        )
    assert not (tmp_path / "w").exists()


def test_a_cut_tokenizer_is_not_cut_again(compress, tmp_path, many_file):
    compress(tmp_path / "w", vocab_size=400, method="unused")
    small = str(tmp_path / "w" / "tokenizer.model")
    count_tokens(str(tmp_path / "c"), many_file, small, processes=1)
    with pytest.raises(UserError, match="unused pieces, which would take rows"):
        compress(tmp_path / "x", counts=str(tmp_path / "c"), tokenizer=small, vocab_size=300)


def test_a_tokenizer_without_bytes_keeps_its_characters(big, many_texts):
    model = type(big.proto).FromString(big.model_bytes)
    model.trainer_spec.byte_fallback = False
    pieces = [piece for piece in model.pieces if piece.type != proto.BYTE]
    del model.pieces[:]
    model.pieces.extend(pieces)
    vocabulary = Vocabulary.of(Tokenizer(model.SerializeToString()))
    keep = prune.required(vocabulary, [])
    assert keep[vocabulary.single].all()


def test_a_real_tokenizer_and_real_text(real_data, tmp_path, compress):
    """The stage's aim: no dead piece, and at most half of the paper's additional tokens."""
    lines = (real_data / "corpora" / "en_gutenberg.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "en.jsonl").write_text("\n".join(lines[::4]), encoding="utf-8")
    settings = {"text": str(tmp_path / "en.jsonl"), "held_out_fraction": 0.1}
    big = str(real_data / "tokenizers" / "mistral_v1_32000.model")
    count_tokens(str(tmp_path / "counts"), tokenizer=big, **settings)
    found, _ = compress(
        tmp_path / "w", counts=str(tmp_path / "counts"), tokenizer=big, vocab_size=16000,
        text=settings["text"],
    )  # fmt: skip
    row = next(row for row in found["trade_off"] if row["size"] == 16000)
    before = found["held_out"]["en"]["tokens_before"]
    assert row["this_dead"] == 0 < row["paper_dead"]
    assert row["this_tokens"] - before <= 0.5 * (row["paper_tokens"] - before)
