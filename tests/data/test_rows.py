"""The packing rule, for any documents: every token a target once, and nothing seen across."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from pangu_tiny.data.rows import Packer, read_marks, token_stream

BEGIN, END = 1, 2
documents = st.lists(st.lists(st.integers(3, 9), max_size=12), max_size=12)
lengths = st.sampled_from([2, 3, 8])
many = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)


def pack(texts, sequence_length, at_once=1000):
    packer = Packer(sequence_length, BEGIN, END)
    rows = []
    for first in range(0, len(texts), at_once):
        rows += packer.add([np.array(t, np.int32) for t in texts[first : first + at_once]])
    return [*rows, *packer.finish()], packer


@functools.partial(jax.jit, static_argnums=(1, 2))
def compiled_marks(rows, begin_id, end_id):
    return read_marks(rows, begin_id, end_id)


def marks_of(rows):
    """Of as many rows whatever their number, so that few shapes are compiled; the rest is padding,
    which must add no target."""
    filled = np.full((100, len(rows[0])), END, np.int32)
    filled[: len(rows)] = rows
    return jax.device_get(compiled_marks(filled, BEGIN, END))


def whole(texts):
    return [[BEGIN, *text, END] for text in texts]


@many
@hypothesis.given(texts=documents, sequence_length=lengths)
def test_documents_come_back_from_the_rows(texts, sequence_length):
    rows, _ = pack(texts, sequence_length)
    assert all(len(row) == sequence_length + 1 for row in rows)
    assert [list(ids) for ids in token_stream(rows, END)] == whole(texts)


@many
@hypothesis.given(texts=documents, sequence_length=lengths, at_once=st.integers(1, 5))
def test_rows_do_not_depend_on_how_documents_arrive(texts, sequence_length, at_once):
    rows, packer = pack(texts, sequence_length)
    others, other = pack(texts, sequence_length, at_once)
    np.testing.assert_array_equal(np.array(rows), np.array(others))
    counts = ("rows", "documents", "tokens", "padding", "cut_documents")
    assert [getattr(packer, c) for c in counts] == [getattr(other, c) for c in counts]


def read_slowly(row):
    """What `read_marks` says, token by token."""
    marked = {"weights": [], "segments": [], "positions": []}
    segment, position, ended = 0, 0, True
    for t, token in enumerate(row[:-1]):
        padding = token == END and ended
        if t == 0 or token == BEGIN:
            segment, position = segment + 1, 0
        ended = token == END
        marked["segments"].append(0 if padding else segment)
        marked["positions"].append(0 if padding else position)
        marked["weights"].append(float(token != END and row[t + 1] != BEGIN))
        position += 1
    return marked


@many
@hypothesis.given(texts=documents.filter(len), sequence_length=lengths)
def test_every_text_token_and_end_mark_is_a_target_once(texts, sequence_length):
    rows, packer = pack(texts, sequence_length)
    marked = marks_of(rows)
    targets = marked.targets[marked.weights == 1]
    expected = [token for document in whole(texts) for token in document[1:]]
    assert list(targets) == expected
    assert packer.tokens - packer.documents == len(expected)


@many
@hypothesis.given(texts=documents.filter(len), sequence_length=lengths)
def test_marks_equal_those_read_token_by_token(texts, sequence_length):
    rows, _ = pack(texts, sequence_length)
    marked = marks_of(rows)
    for index, row in enumerate(rows):
        for name, expected in read_slowly(row).items():
            assert list(getattr(marked, name)[index]) == expected, name
        assert list(marked.inputs[index]) == list(row[:-1])


@many
@hypothesis.given(texts=documents, sequence_length=lengths)
def test_counts_are_those_of_the_rows(texts, sequence_length):
    rows, packer = pack(texts, sequence_length)
    stream = sum(map(len, whole(texts)))
    assert (packer.rows, packer.documents, packer.tokens) == (len(rows), len(texts), stream)
    overlaps = sum(row[-1] != END for row in rows[:-1])
    assert packer.padding == len(rows) * (sequence_length + 1) - stream - overlaps
    # A document is cut if its tokens after the begin mark are targets in more than one row.
    owner, rows_of = 0, {}
    for index, row in enumerate(rows):
        for before, token in itertools.pairwise(row):
            if before != END and token != BEGIN:
                rows_of.setdefault(owner, set()).add(index)
                owner += token == END
    cut = sum(len(found) > 1 for found in rows_of.values())
    assert packer.cut_documents == cut


def test_a_row_that_ends_with_a_document_is_followed_by_the_next_one():
    rows, packer = pack([[5, 6], [7]], 3)
    assert [list(row) for row in rows] == [[BEGIN, 5, 6, END], [BEGIN, 7, END, END]]
    assert (packer.padding, packer.cut_documents) == (1, 0)


def test_a_cut_row_overlaps_by_one_token():
    rows, packer = pack([[5, 6, 7, 8]], 3)
    assert [list(row) for row in rows] == [[BEGIN, 5, 6, 7], [7, 8, END, END]]
    marked = marks_of(rows)
    assert marked.segments[:2].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert marked.positions[:2].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert marked.weights[:2].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert packer.cut_documents == 1


def test_rows_that_end_inside_a_document_are_refused():
    rows, _ = pack([[5, 6, 7, 8]], 3)
    with pytest.raises(ValueError, match="end inside a document"):
        list(token_stream(rows[:1], END))
