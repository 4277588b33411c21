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

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pangu_tiny.data.text import Skipped, Text, find_sources, held_out, read_documents, split_units
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.progress import Progress
from pangu_tiny.tokenizer import huggingface, prune, report
from pangu_tiny.tokenizer.counts import read_counts
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.vocabulary import Vocabulary
from pangu_tiny.workdir import claim, write_atomically

TOKENIZER, ID_MAP, REPORT = "tokenizer.model", "id_map.json", "report.json"


class Cut(NamedTuple):
    """A big tokenizer with all that a cut is decided by.

    Attributes:
      gone: the ids that may go, the first to go first.
      times: int64 [n], how often each id was counted.
      merged_through: whether what goes stays as an unused piece.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    gone: np.ndarray
    times: np.ndarray
    merged_through: bool

    @classmethod
    def plan(
        cls, tokenizer: Tokenizer, times: np.ndarray, method: str, keep: Sequence[str] = ()
    ) -> "Cut":
        """Decides what goes first.

        Args:
          tokenizer: a BPE model.
          times: int [n], how often each id was counted.
          method: one of `prune.METHODS`.
          keep: pieces that must stay, by name.

        Raises:
          UserError: the tokenizer cannot be cut, or a name is no piece of it.
        """
        vocabulary = Vocabulary.of(tokenizer)
        if tokenizer.vocab_size != tokenizer.pieces:
            raise UserError(
                f"tokenizer {tokenizer.name} has {tokenizer.pieces - tokenizer.vocab_size:,} unused"
                " pieces, so that it was cut before; cut the whole one instead"
            )
        gone = prune.order(method, vocabulary, times, prune.required(vocabulary, list(keep)))
        return cls(tokenizer, vocabulary, gone, times, method == "unused")

    @property
    def smallest(self) -> int:
        return len(self.vocabulary.pieces) - len(self.gone)

    def kept(self, size: int) -> np.ndarray:
        """The ids that stay, ascending."""
        out = self.gone[: len(self.vocabulary.pieces) - size]
        return np.setdiff1d(np.arange(len(self.vocabulary.pieces)), out, assume_unique=True)

    def coverage(self) -> np.ndarray:
        """[s], the share of the counted tokens whose ids are kept at each size, from the smallest
        to the whole."""
        lost = np.cumsum(self.times[self.gone])[::-1]
        return 1 - np.append(lost, 0) / self.times.sum()

    def compact(self, size: int) -> Tokenizer:
        """The tokenizer of that size. Pieces that can be reached by nobody go for good, and so do
        single characters, which would be emitted though they are unused."""
        kept = self.kept(size)
        if not self.merged_through:
            return self.tokenizer.select(kept)
        lost = np.ones(len(self.vocabulary.pieces), bool)
        lost[kept] = False
        lost &= ~self.vocabulary.dead & ~self.vocabulary.single
        return self.tokenizer.select(kept, np.flatnonzero(lost))


def compress_tokenizer(
    counts: str | list[str],
    tokenizer: str,
    workdir: str,
    model: ModelShape,
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
        what the cut saves there.
      vocab_size: the number of ids that are emitted; or
      coverage: the share of the counted tokens that the kept ids make up (the paper: 0.9786 at
        48,000); the smallest such size is taken; or
      embedding_share: the share of the model's parameters in embedding and head that is not
        passed (the paper: 0.18); the largest such size is taken.
      method: "flow" leaves no dead piece; "unused" keeps what went as unused pieces, for the
        shortest text; "paper" is the published rule, which kills frequent pieces.
      keep: pieces that must stay, beside marks, bytes, user-defined ones and the space.
      text: documents whose held-out part, by the rule and fraction of the counts, the report
        measures; all of them where the counts do not know it. Without text it measures nothing.
      text_key: the JSON key, Parquet column or TFDS feature that holds the text.
      text_bytes: text measured of each source, at most.

    Returns:
      What report.json holds.

    Raises:
      UserError: of the arguments; nothing is written then.
    """
    big = Tokenizer.open(tokenizer)
    counted = read_counts(counts, big)
    cut = Cut.plan(big, counted.times, method, keep or [])
    size = _size(cut, model, vocab_size, coverage, embedding_share)
    texts = _held_out_texts(text, text_key, text_bytes, counted.held_out_fraction)
    identity = {
        "tokenizer_digest": big.digest,
        "counts_digest": counted.digest,
        "size": size,
        "method": method,
        "keep": sorted(keep or []),
        "model": dataclasses.asdict(model),
        "text": {name: report.digest(found) for name, found in texts.items()},
    }
    folder = claim(workdir, "compress-tokenizer", identity)
    if not (folder / REPORT).exists():
        compact = cut.compact(size)
        table = id_map(cut, compact, size, method)
        paper = cut if method == "paper" else Cut.plan(big, counted.times, "paper", keep or [])
        with Progress("measuring", None) as progress:
            found = report.measure(cut, paper, compact, size, counted, texts, model, progress)
        found |= {"method": method, "size": size, **_export(folder, compact)}
        write_atomically(folder / TOKENIZER, compact.model_bytes)
        write_atomically(folder / ID_MAP, json.dumps(table))
        write_atomically(folder / "report.html", report.page_of(found, cut))
        write_atomically(folder / REPORT, json.dumps(found, indent=1, ensure_ascii=False))
    found = json.loads((folder / REPORT).read_text())
    print(report.summary(os.fspath(folder), found))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class IdMap:
    """The id_map.json of a folder of compress-tokenizer.

    Attributes:
      folder, method, exact, old_digest, new_digest: as there.
      old_to_new: for every old id its new ones.
      new_to_old: for every new id the old one.
    """

    folder: str
    method: str
    exact: bool
    old_digest: str
    new_digest: str
    old_to_new: list[list[int]]
    new_to_old: list[int]

    @classmethod
    def open(cls, folder: str) -> "IdMap":
        """Reads the map.

        Raises:
          UserError: there is none.
        """
        file = epath.Path(folder) / ID_MAP
        if not file.exists():
            raise UserError(
                f"tokenizer {folder} has no {ID_MAP}; expected a folder of compress-tokenizer"
            )
        return cls(folder, **json.loads(file.read_text()))

    def tokenizer(self) -> Tokenizer:
        """The compact tokenizer beside the map.

        Raises:
          UserError: it is another one.
        """
        found = Tokenizer.open(epath.Path(self.folder) / TOKENIZER)
        if found.digest != self.new_digest:
            raise UserError(
                f"tokenizer {found.name} has digest {found.digest}; {ID_MAP} beside it is of"
                f" {self.new_digest}"
            )
        return found

    def map(self, ids: np.ndarray) -> np.ndarray:
        """What a text's old ids become, int32."""
        flat, starts, lengths = self._table
        counts = lengths[ids]
        firsts = np.cumsum(counts) - counts
        places = np.repeat(starts[ids] - firsts, counts) + np.arange(counts.sum())
        return flat[places]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = np.array(list(map(len, self.old_to_new)))
        flat = np.array([new for ids in self.old_to_new for new in ids], np.int32)
        return flat, np.cumsum(lengths) - lengths, lengths


def _size(
    cut: Cut,
    model: ModelShape,
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
            f"compress_tokenizer has {' and '.join(given) or 'no target'}; expected exactly one of"
            " vocab_size, coverage and embedding_share"
        )
    smallest, largest = cut.smallest, len(cut.vocabulary.pieces)
    if vocab_size is not None:
        if not smallest <= vocab_size <= largest:
            raise UserError(
                f"compress_tokenizer.vocab_size is {vocab_size:,}; expected from {smallest:,},"
                f" which must be kept, to {largest:,}, which the tokenizer has"
            )
        return vocab_size
    value = targets[given[0]]
    if not 0 < value < 1:
        raise UserError(f"compress_tokenizer.{given[0]} is {value}; expected between 0 and 1")
    if coverage is not None:
        return smallest + int(np.argmax(cut.coverage() >= coverage))
    low, high = smallest, largest  # the share grows with the size
    if report.embedding_share(model, low) > embedding_share:
        raise UserError(
            f"compress_tokenizer.embedding_share is {embedding_share}; the {smallest:,} pieces that"
            f" must be kept are {report.embedding_share(model, low):.2%} of the model"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if report.embedding_share(model, middle) <= embedding_share:
            low = middle
        else:
            high = middle - 1
    return low


def _held_out_texts(
    text: Text | None, text_key: str, text_bytes: int, fraction: float | None
) -> dict[str, list[str]]:
    """The documents to measure on, by source."""
    found: dict[str, list[str]] = {}
    for source in find_sources(text) if text is not None else ():
        chosen, size = [], 0
        for unit in split_units([source]):
            for document in read_documents(unit, Skipped(), text_key):
                if size < text_bytes and (fraction is None or held_out(document, fraction)):
                    chosen.append(document)
                    size += len(document.encode())
            if size >= text_bytes:
                break
        if not chosen:
            raise UserError(
                f"text {source.name} has no held-out document to measure on (the counts held out"
                f" {fraction}); expected some, or no text"
            )
        found[source.name] = chosen
    return found


def id_map(cut: Cut, compact: Tokenizer, size: int, method: str) -> dict[str, Any]:
    """What id_map.json holds."""
    small = Vocabulary.of(compact)
    kept = cut.kept(size)
    old_to_new: list[list[int]] = [[] for _ in cut.vocabulary.pieces]
    for new, old in enumerate(kept):
        old_to_new[old] = [new]
    for old in cut.gone[: len(cut.vocabulary.pieces) - size]:
        old_to_new[old] = small.emit(cut.vocabulary.pieces[old])
    return {
        "method": method,
        "exact": cut.merged_through,
        "old_digest": cut.tokenizer.digest,
        "new_digest": compact.digest,
        "old_to_new": old_to_new,
        "new_to_old": kept.tolist(),
    }


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
