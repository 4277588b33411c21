"""Documents out of every kind of file, each once, and what is wrong with a file by line."""

import gzip
import hashlib
import json
import struct

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pangu_tiny.errors import UserError
from pangu_tiny.text.documents import Unit, held_out, read_documents, split_units
from pangu_tiny.text.formats import Place, _join_lines, split_file
from pangu_tiny.text.left_out import Skipped
from pangu_tiny.text.sources import Source, find_sources

TEXTS = ["one", "two\nlines", "größer 世界 🙂", "a" * 5000, '"quoted" \\ \t', "last"]


def read(text, unit_bytes=2**20, **settings):
    """All documents and what was skipped."""
    skipped = Skipped()
    units = split_units(find_sources(text), unit_bytes)
    return [d for unit in units for d in read_documents(unit, skipped, **settings)], skipped


def jsonl(texts, **more):
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def write_txt(folder):
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_bytes(text.encode())
    return folder


def write_jsonl(folder):
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS, id=1))
    return folder / "a.jsonl"


def write_unusual_jsonl(folder):
    """A byte-order mark, Windows line ends, blank lines, no last line end."""
    lines = jsonl(TEXTS).replace(b"\n", b"\r\n\r\n \n")
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.rstrip())
    return folder / "a.jsonl"


def write_gz(folder):
    """Two members, as `cat a.gz b.gz` leaves them."""
    content = gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:]))
    (folder / "a.jsonl.gz").write_bytes(content)
    return folder / "a.jsonl.gz"


def write_zst(folder):
    """Two frames, cut inside of a line, and one to skip, as pzstd writes them."""
    content = jsonl(TEXTS)
    frames = [zstandard.compress(part) for part in (content[:20], content[20:])]
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    (folder / "a.NDJSON.zst").write_bytes(skipped.join(frames))
    return folder / "a.NDJSON.zst"


def write_long_window(folder):
    """As zstd --long=31 writes it, which would take gigabytes: a frame that says so of itself."""
    frame = bytearray(zstandard.ZstdCompressor(write_content_size=False).compress(jsonl(TEXTS)))
    assert not frame[4] & 0b1110_0000, "the byte behind the descriptor is the window's"
    frame[5] = (31 - 10) << 3
    (folder / "a.json.zst").write_bytes(frame)
    return folder / "a.json.zst"


def write_compressed_txt(folder):
    for index, text in enumerate(TEXTS):
        if index % 2:
            (folder / f"{index}.TXT.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{index}.txt.ZST").write_bytes(zstandard.compress(text.encode()))
    return folder


def write_marked_txt(folder):
    """With byte-order marks; UTF-16 without one is known by its zeros."""
    encodings = ["utf-8-sig", "utf-16", "utf-32", "utf-16", "utf-16-le", "utf-16-be"]
    for index, (text, encoding) in enumerate(zip(TEXTS, encodings, strict=True)):
        (folder / f"{index}.txt").write_bytes(text.encode(encoding))
    return folder


def write_parquet(folder, column=TEXTS):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": column})
    pyarrow.parquet.write_table(table, folder / "a.Parquet", row_group_size=2)
    return folder / "a.Parquet"


def write_folder(folder):
    """Files in a folder of a folder come in the order of their paths; others are left alone."""
    (folder / "b").mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS[:2]))
    (folder / "b" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[2:4])))
    (folder / "c.jsonl").write_bytes(jsonl(TEXTS[4:]))
    (folder / "README.md").write_text("not a document")
    (folder / ".hidden.txt").write_text("not a document")
    return folder


def write_glob(folder):
    for name in ("x1", "x2", "y1"):
        (folder / name).mkdir()
    (folder / "x1" / "a.jsonl").write_bytes(jsonl(TEXTS[:2]))
    (folder / "x1" / "a.txt").write_text("not asked for")
    (folder / "x2" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[2:])))
    (folder / "y1" / "a.jsonl").write_bytes(jsonl(["not asked for"]))
    return f"{folder}/x?/*.jsonl*"


def write_tfds(folder, texts=TEXTS):
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(optional=True)})
    name = "set-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1")
    for text in texts:
        writer.write(features.serialize_example({"text": text}))
    writer.close()
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(texts)],
        num_bytes=sum(len(text or "") for text in texts),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=str(folder), dataset_name="set", split="train", filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], check_data=False
    )
    return f"tfds:{folder}"


WRITERS = [
    write_txt, write_jsonl, write_unusual_jsonl, write_gz, write_zst, write_long_window,
    write_compressed_txt, write_marked_txt, write_parquet, write_folder, write_glob, write_tfds,
]  # fmt: skip


@pytest.mark.parametrize("unit_bytes", [1, 50, 2**20])
@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, write, unit_bytes):
    documents, skipped = read(str(write(tmp_path)), unit_bytes)
    assert documents == TEXTS
    assert skipped == Skipped()


def encoded(kind):
    return pyarrow.array([text.encode() for text in TEXTS], kind)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS, pyarrow.string_view()),
        encoded(pyarrow.binary()),
        encoded(pyarrow.large_binary()),
        encoded(pyarrow.binary_view()),
        pyarrow.array(TEXTS).dictionary_encode(),
        encoded(pyarrow.binary()).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_text_that_parquet_has(tmp_path, column):
    assert read(str(write_parquet(tmp_path, column)))[0] == TEXTS


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    chunks=st.lists(st.text("ab\n", max_size=5).map(str.encode), max_size=12),
)
def test_lines_of_a_stream_do_not_depend_on_its_pieces(chunks):
    whole = b"".join(chunks)
    lines = whole.removesuffix(b"\n").split(b"\n") if whole else []
    assert list(_join_lines(iter(chunks))) == lines


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=20),
    unit_bytes=st.integers(1, 200),
)
def test_a_file_cut_anywhere_gives_every_line_once(tmp_path_factory, texts, unit_bytes):
    texts = [text for text in texts if not text.isspace()]
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines), encoding="utf-8", newline="")
    parts = split_file(str(file), file.stat().st_size, unit_bytes)
    assert len(parts) == max(1, -(-file.stat().st_size // unit_bytes))
    found = [d for part in parts for d in read_documents(Unit("a", (part,)), Skipped())]
    assert found == texts


def test_units_hold_neighbours_of_one_source_only(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(5):
            (tmp_path / name / f"{index}.txt").write_text(f"{name}{index}" * 10)
    sources = find_sources([str(tmp_path / "a"), str(tmp_path / "b")])
    units = split_units(sources, 45)
    assert [(unit.source, len(unit.parts)) for unit in units] == [
        ("a", 2), ("a", 2), ("a", 1), ("b", 2), ("b", 2), ("b", 1),
    ]  # fmt: skip
    assert all(unit.size <= 45 for unit in units)


def test_sources_are_named_after_their_files_or_as_asked(tmp_path):
    write_folder(tmp_path)
    a, c = str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")
    assert [s.name for s in find_sources([a, f"{tmp_path}/b/*.gz", str(tmp_path / "b")][:2])] == [
        "a",
        "b",
    ]
    (source,) = find_sources({"mine": [c, a]})
    assert source.name == "mine"
    assert [path for path, _ in source.files] == [c, a], "files keep the order that was asked for"
    with pytest.raises(UserError, match="two sources named 'a'"):
        find_sources([a, a])


def test_the_fingerprint_is_of_content(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("same" if name != "c" else "some")
    a, b, c = (find_sources(str(tmp_path / name))[0].fingerprint() for name in "abc")
    assert a == b != c


def test_the_held_out_rule():
    """By the first eight bytes of the hash of the text, and nothing else: a rule that other
    datasets were made by cannot change."""
    share = int.from_bytes(hashlib.sha256("größer".encode()).digest()[:8], "big") / 2**64
    assert not held_out("größer", share - 1e-9) and held_out("größer", share + 1e-9)
    texts = [f"document {n}" for n in range(2000)]
    assert not any(held_out(text, 0.0) for text in texts)
    # Binomial: 200 ± 5 standard deviations of 13.4.
    assert 133 < sum(held_out(text, 0.1) for text in texts) < 267
    assert {t for t in texts if held_out(t, 0.1)} < {t for t in texts if held_out(t, 0.3)}


def test_empty_documents_are_counted_and_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(["", "one", " \n\t", *[""] * 7]))
    documents, skipped = read(str(file))
    assert documents == ["one"]
    assert skipped.empty == 9
    assert [str(place) for place in skipped.places["empty"]] == [
        f"{file}:{line}" for line in (1, 3, 4, 5, 6)
    ]


def write_null_jsonl(folder):
    (folder / "a.jsonl").write_bytes(jsonl(["one", None, "two"]))
    return str(folder / "a.jsonl")


def write_null_parquet(folder):
    table = pyarrow.table({"text": ["one", None, "two"]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return str(folder / "a.parquet")


def write_null_tfds(folder):
    return write_tfds(folder, ["one", None, "two"])


@pytest.mark.parametrize("write", [write_null_jsonl, write_null_parquet, write_null_tfds])
def test_nulls_are_skipped_and_named(tmp_path, write):
    file = write(tmp_path)
    documents, skipped = read(file)
    assert documents == ["one", "two"]
    assert (skipped.null, skipped.empty, skipped.bad_utf8) == (1, 0, 0)
    assert [str(place) for place in skipped.places["null"]] == [f"{file}:2"]


def test_the_first_places_are_those_of_the_first_files():
    """In whichever order the processes end, and Beam adds up."""
    parts = [Skipped() for _ in range(4)]
    for index, skipped in enumerate(parts):
        for line in (3, 10):
            skipped.add("bad_utf8", Place("a.jsonl", 1000 * index, line), 7)
    whole = sum(parts, Skipped())
    assert (whole.bad_utf8, whole.bad_utf8_bytes, whole.empty) == (8, 56, 0)
    places = [(place.start, place.line) for place in whole.places["bad_utf8"]]
    assert places == [(0, 3), (0, 10), (1000, 3), (1000, 10), (2000, 3)]
    assert parts[3] + (parts[1] + parts[0]) + parts[2] == whole


def test_a_tfds_set_without_the_feature_says_what_it_has(tmp_path):
    with pytest.raises(UserError, match=r"has features \['text'\], expected text in 'body'"):
        read(write_tfds(tmp_path), text_key="body")


def test_lines_are_counted_from_the_start_of_the_file_in_every_part(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(["x" * 30, "", "y" * 30, "", "z"]))
    for unit_bytes in (10, 33, 50, 1000):
        places = read(str(file), unit_bytes)[1].places["empty"]
        assert [str(place) for place in places] == [f"{file}:2", f"{file}:4"]


def write_bad_jsonl(folder):
    (folder / "a.jsonl").write_bytes(jsonl(["one"]) + b'{"text": "\xff"}\n' + jsonl(["two"]))
    return folder / "a.jsonl", 2, 14


def write_surrogate_jsonl(folder):
    (folder / "a.jsonl").write_bytes(jsonl(["one"]) + b'{"text": "\\ud800"}\n' + jsonl(["two"]))
    return folder / "a.jsonl", 2, 3


def write_bad_txt(folder):
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_bytes(b"x\ny\n\xff")
    (folder / "c.txt").write_text("two")
    return folder / "b.txt", 3, 5


def write_bad_parquet(folder):
    column = pyarrow.array([b"one", b"\xff", b"two"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
    return folder / "a.parquet", 2, 1


@pytest.mark.parametrize(
    "write", [write_bad_jsonl, write_surrogate_jsonl, write_bad_txt, write_bad_parquet]
)
def test_bytes_that_are_not_utf8_are_named_and_skipped_or_fatal(tmp_path, write):
    file, line, size = write(tmp_path)
    documents, skipped = read(str(tmp_path))
    assert documents == ["one", "two"]
    assert (skipped.bad_utf8, str(skipped.places["bad_utf8"][0])) == (1, f"{file}:{line}")
    assert skipped.bad_utf8_bytes == size
    with pytest.raises(UserError, match=f"{file}:{line} is not UTF-8"):
        read(str(tmp_path), bad_utf8="fail")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"text": "a"}\n{oops\n', r"a\.jsonl:2 is not JSON"),
        (b'{"text": "a"}\n\n["a"]\n', r"a\.jsonl:3 has a list, expected a string under 'text'"),
        (b'{"body": "a"}\n', r"a\.jsonl:1 has keys \['body'\], expected a string under 'text'"),
        (b'{"text": 3}\n', r"a\.jsonl:1 has 3 there, expected a string under 'text'"),
        (b'{"text": "a"', r"a\.jsonl:1 has the beginning of a JSON value, expected .* jq -c \."),
        (b'{"text": "a"}\n{"text"', r"a\.jsonl:2 is not JSON"),
        (b'[{"text": "a"}]', r"a\.jsonl is one JSON array, expected .* jq -c '\.\[\]'"),
        (jsonl(["a"]).decode().encode("utf-16"), r"a\.jsonl is UTF-16, .* iconv -f UTF-16 -t"),
        (jsonl(["a"]).decode().encode("utf-16-le"), r"a\.jsonl is UTF-16LE, .* -f UTF-16LE"),
        (jsonl(["a"]).decode().encode("utf-32-be"), r"a\.jsonl is UTF-32BE, .* -f UTF-32BE"),
        (b"\0" * 99, r"a\.jsonl:1 is not JSON"),
        (b'{"text": "a"}\n' + b"[" * 100_000, r"a\.jsonl:2 is not JSON"),
    ],
)
def test_lines_that_hold_no_document_are_named(tmp_path, content, named):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=named):
        read(str(tmp_path))


def test_an_array_over_many_lines_is_named_by_whoever_reads_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}] * 50, indent=1))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    for file in tmp_path.iterdir():
        for unit in split_units(find_sources(str(file)), 100):
            with pytest.raises(UserError, match=f"{file} is one JSON array"):
                list(read_documents(unit, Skipped()))


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a", "text": "b"}\n')
    assert read(str(tmp_path), text_key="body")[0] == ["a"]


@pytest.mark.parametrize("write", [write_gz, write_zst, write_long_window, write_parquet])
def test_truncated_files_are_not_taken_for_whole_ones(tmp_path, write):
    file = write(tmp_path)
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(UserError, match=str(file)):
        read(str(file))


def test_a_zst_that_ends_after_a_whole_line_is_truncated_all_the_same(tmp_path):
    compressor = zstandard.ZstdCompressor().compressobj()
    content = compressor.compress(jsonl(TEXTS))
    content += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # and not the frame's end
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    with pytest.raises(UserError, match="ends before the end of its stream"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("none.jsonl", "none.jsonl does not exist"),
        ("*.parquet", r"\*.parquet holds no documents"),
        ("a/**/*.jsonl", r"a/\*\*/\*\.jsonl: \*\* is not known"),
        ("empty", "empty holds no documents"),
        ("a.csv", r"but 1 file of no known kind \(a.csv\), expected .txt, .jsonl"),
        ([], "text names nothing"),
        ("tfds:none_such", "tfds:none_such cannot be opened as a TFDS set"),
    ],
)
def test_text_that_is_not_there_is_refused(tmp_path, monkeypatch, text, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        find_sources(text)


def test_a_parquet_file_without_the_column_says_what_it_has(tmp_path):
    write_parquet(tmp_path)
    with pytest.raises(UserError, match=r"columns \['id', 'text'\], expected strings in 'body'"):
        read(str(tmp_path), text_key="body")
    with pytest.raises(UserError, match="has int64 in column 'id', expected strings"):
        read(str(tmp_path), text_key="id")
    twice = pyarrow.Table.from_arrays([pyarrow.array(TEXTS)] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns 'text', expected strings"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("size", "unit"),
    [(10**6, 2**22), (10**9, 2**22), (10**11, 2**28), (6 * 10**12, 6 * 10**12 // 1024)],
)
def test_a_unit_is_no_less_than_a_thousandth(size, unit):
    """Terabytes are cut into about a thousand shards, each of which stays open while training."""
    sources = [Source("much", (("much.jsonl", size),))]  # cut by its size, not read
    assert len(split_units(sources)) == -(-size // unit)
