"""The stage that cuts a compact tokenizer out of a big one.

The folder that it writes holds

    tokenizer.model     the compact SentencePiece model
    id_map.json         `old_to_new`: for every id of the big tokenizer the ids that it becomes;
                        `new_to_old`: for every id of the compact one the id that it was;
                        `method`, `old_digest`, `new_digest`, and `exact`: whether the compact
                        tokenizer gives for every text just what this table makes of the big one's
    huggingface/        the same tokenizer for Hugging Face, where their format can express it
    report.html, report.json    what was won and what was lost; written last
"""

import bisect
import functools
import json
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.errors import UserError, check_number
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.page import Report
from pangu_tiny.text.documents import held_out, read_documents, split_units
from pangu_tiny.text.left_out import Skipped
from pangu_tiny.text.sources import Text, find_sources
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary import huggingface, report
from pangu_tiny.vocabulary.counts import read_counts
from pangu_tiny.vocabulary.id_map import ID_MAP, TOKENIZER, Cut, id_map
from pangu_tiny.vocabulary.pieces import Vocabulary
from pangu_tiny.workdir import claim, read_json, write_atomically

REPORT = "report.json"


def compress_tokenizer(
    counts: str | list[str],
    tokenizer: str,
    workdir: str,
    model: ModelShape | None = None,
    vocab_size: int | None = None,
    coverage: float | None = None,
    embedding_share: float | None = None,
    method: str = "flow",
    keep: list[str] | None = None,
    text: Text | None = None,
    text_key: str = "text",
    text_bytes: int = 2**24,
) -> dict[str, Any]:
    """Cuts a big SentencePiece BPE model down to what a corpus uses.

    Args:
      counts: a folder of count-tokens, or several, which are added up.
      tokenizer: the big model file, the one that was counted with.
      workdir: the folder to write, local or gs://.
      model: the shape that the tokenizer is for; its vocab_size plays no part. The report says
        what the cut saves there; without a shape it leaves that out.
      vocab_size: the number of ids that are emitted; or
      coverage: the share of the counted tokens that the kept ids make up (the paper: 0.9786 at
        48,000); the smallest such size is taken; or
      embedding_share: the share of the model's parameters in embedding and head that is not
        passed (the paper: 0.18), which needs `model`; the largest such size is taken.
      method: "flow" leaves no unreachable piece; "unused" keeps what went as unused pieces, for the
        shortest text; "paper" is the published rule, which kills frequent pieces.
      keep: pieces that must stay, beside marks, bytes, user-defined ones and the space.
      text: documents whose held-out part, by the rule and fraction of the counts, the report
        measures; all of them where the counts do not know it. Without text it measures nothing.
      text_key: the JSON key, Parquet column or TFDS feature that holds the text.
      text_bytes: text measured of each source, at most.
    """
    big = Tokenizer.open(tokenizer)
    counted = read_counts(counts, big)
    vocabulary = Vocabulary.of(big)
    cut = Cut.plan(big, vocabulary, counted.times, method, keep or [])
    check_number("compress_tokenizer.text_bytes", text_bytes, 1)
    size = _size(cut, model, vocab_size, coverage, embedding_share)
    texts = _held_out_texts(text, text_key, text_bytes, counted.held_out_fraction)
    identity = {
        "tokenizer_digest": big.digest,
        "counts_digest": counted.digest,
        "size": size,
        "method": method,
        "keep": sorted(keep or []),
        "model": model and {k: v for k, v in vars(model).items() if k != "vocab_size"},
        "text": {name: report.digest(documents) for name, documents in texts.items()},
    }
    folder = claim(workdir, "compress-tokenizer", identity)
    if not (folder / REPORT).exists():
        compact = cut.compact(size)
        table = id_map(cut, compact, size, method)
        paper = Cut.plan(big, vocabulary, counted.times, "paper", keep or [])
        figures = report.measure(cut, paper, compact, size, counted, texts, model)
        figures |= {"method": method, "size": size, **_export(folder, compact)}
        write_atomically(folder / TOKENIZER, compact.model_bytes)
        write_atomically(folder / ID_MAP, json.dumps(table))
        report.report_of(figures, cut).write(folder)
        write_atomically(folder / REPORT, json.dumps(figures, indent=1, ensure_ascii=False))
    figures = read_json(folder / REPORT)
    print(f"tokenizer {folder / TOKENIZER}: digest {figures['compact']['digest'][:12]}")
    print(Report("", report.facts(figures), report.unknown(figures)).text())
    print(f"  report       {folder / 'report.html'}")
    return figures


def _size(
    cut: Cut,
    model: ModelShape | None,
    vocab_size: int | None,
    coverage: float | None,
    embedding_share: float | None,
) -> int:
    targets = {
        "vocab_size": vocab_size,
        "coverage": coverage,
        "embedding_share": embedding_share,
    }
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise UserError(
            f"compress_tokenizer has {' and '.join(given) or 'no target'}, expected exactly one of"
            " vocab_size, coverage and embedding_share"
        )
    smallest, largest = cut.smallest, len(cut.vocabulary.pieces)
    if vocab_size is not None:
        # What must be kept, and what the tokenizer has.
        check_number("compress_tokenizer.vocab_size", vocab_size, smallest, largest)
        return vocab_size
    value = targets[given[0]]
    check_number(f"compress_tokenizer.{given[0]}", value, above=0, below=1)
    if coverage is not None:
        return smallest + int(np.argmax(cut.coverage() >= coverage))
    if model is None:
        raise UserError(
            "compress_tokenizer.embedding_share is of a model's parameters: bind ModelShape.*"
        )
    if (least := report.embedding_share(model, smallest)) > embedding_share:
        raise UserError(
            f"compress_tokenizer.embedding_share is {embedding_share}; the {smallest:,} pieces that"
            f" must be kept are {least:.2%} of the model"
        )
    sizes = range(smallest, largest + 1)  # the share grows with the size
    share = functools.partial(report.embedding_share, model)
    return sizes[bisect.bisect_right(sizes, embedding_share, key=share) - 1]


def _held_out_texts(
    text: Text | None, text_key: str, text_bytes: int, fraction: float | None
) -> dict[str, list[str]]:
    """The documents to measure on, by source."""
    texts: dict[str, list[str]] = {}
    for source in find_sources(text) if text is not None else ():
        chosen, size = [], 0
        units = split_units([source])
        documents = (text for unit in units for text in read_documents(unit, Skipped(), text_key))
        while size < text_bytes and (document := next(documents, None)) is not None:
            if fraction is None or held_out(document, fraction):
                chosen.append(document)
                size += len(document.encode())
        if chosen:
            texts[source.name] = chosen
    if text is not None and not texts:
        raise UserError(
            f"text {text} has no held-out document to measure on (the counts held out {fraction}),"
            " expected some, or no text"
        )
    return texts


def _export(folder: epath.Path, compact: Tokenizer) -> dict[str, Any]:
    """Writes the Hugging Face files; where their format cannot express the model, says why."""
    try:
        files = huggingface.export(compact)
    except UserError as error:
        return {"huggingface": None, "huggingface_refused": str(error)}
    (folder / "huggingface").mkdir(exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / "huggingface" / name, content)
    return {"huggingface": "huggingface/tokenizer.json"}
