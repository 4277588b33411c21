"""The rows of benchmarks, in the files in which OpenCompass keeps them."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from pangu_tiny.benchmark.questions import Reader, Row
from pangu_tiny.errors import UserError, failing_as


def _text(path: epath.Path) -> str:
    with failing_as(f"benchmark.folder: {path} cannot be read as text", OSError, UnicodeError):
        return path.read_bytes().decode("utf-8-sig")


def csv_rows(names: Sequence[str] = (), headed: bool = False) -> Reader:
    """Rows of a CSV whose fields are named here, or in its first row, which it has if it is headed
    or they are not named here."""

    def read(path: epath.Path) -> Iterator[Row]:
        lines, header = csv.reader(io.StringIO(_text(path), newline="")), list(names)
        heading = headed or not names
        while True:
            with failing_as(f"benchmark.folder: {path}, line {lines.line_num + 1}", csv.Error):
                cells = next(lines, None)
            if cells is None:
                return
            if heading:
                heading, header = False, header or cells
            elif cells:
                yield Row(dict(zip(header, cells, strict=False)), f"{path}, line {lines.line_num}")

    return read


def _objects(path: epath.Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Of a file with one a line: each, and where it stands."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        with failing_as(f"benchmark.folder: {where} is not JSON", ValueError, RecursionError):
            found = json.loads(line)
        if not isinstance(found, dict):
            raise UserError(f"benchmark.folder: {where} is no object")
        yield found, where


def json_rows(path: epath.Path) -> Iterator[Row]:
    """Objects, one a line; a list of labels is one text, true and false are written so."""
    for row, where in _objects(path):
        yield Row(
            {name: _written(value) for name, value in row.items() if value is not None}, where
        )


def _written(value: Any) -> str:
    if isinstance(value, list):
        return "".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def exam_rows(path: epath.Path) -> Iterator[Row]:
    """AGI-Eval's: a passage stands before the question, options have a line each, and where there
    are none the answer is the label."""
    for row, where in _objects(path):
        with failing_as(f"benchmark.folder: {where} is no question", KeyError, TypeError):
            fields = {
                "question": (row["passage"] or "") + row["question"],
                "options": "\n".join(row["options"] or []),
                "label": _written(row["label"] or row["answer"]),
            }
        yield Row(fields, where)


def dialogue_rows(path: epath.Path) -> Iterator[Row]:
    """C3's: a list of [paragraphs, questions, name]; questions of fewer than four choices are
    filled up with their first."""
    with failing_as(f"benchmark.folder: {path} is not JSON", ValueError, RecursionError):
        entries = json.loads(_text(path))
    if not isinstance(entries, list):
        raise UserError(f"benchmark.folder: {path} is no list of dialogues")
    for number, entry in enumerate(entries, 1):
        where = f"{path}, dialogue {number}"
        with failing_as(
            f"benchmark.folder: {where} is no dialogue", ValueError, KeyError, TypeError
        ):
            paragraphs, questions, *_ = entry
            for question in questions:
                choices = question["choice"]
                filled = [*choices, *choices[:1] * (4 - len(choices))]
                fields = {
                    "content": " ".join(paragraphs),
                    "question": question["question"],
                    "label": str(choices.index(question["answer"])),
                }
                fields |= {f"choice{i}": choice for i, choice in enumerate(filled)}
                yield Row(fields, where)


def labelled_rows(path: epath.Path) -> Iterator[Row]:
    """PIQA's: labels lie beside the rows, a line each."""
    labels = path.parent / "dev-labels.lst"
    if not labels.exists():
        raise UserError(
            f"benchmark.folder: {labels} is missing, piqa/{labels.name} of OpenCompass's folder"
        )
    rows, found = list(json_rows(path)), _text(labels).split()
    if len(rows) != len(found):
        raise UserError(
            f"benchmark.folder: {labels} has {len(found)} labels, expected {len(rows)}, a row each"
        )
    for row, label in zip(rows, found, strict=True):
        yield row._replace(fields={**row.fields, "label": label})
