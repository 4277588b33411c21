"""What a dataset says of itself: dataset.json, TFDS's metadata, and the report."""

import json
from typing import Any

from etils import epath

from pangu_tiny.data import records, rows
from pangu_tiny.data.dataset import DESCRIPTION, TokenDataset
from pangu_tiny.data.shards import SPLITS
from pangu_tiny.errors import UserError
from pangu_tiny.text.left_out import count_skipped, left_out_lines, skipped_lines
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.unknown import unknown_lines
from pangu_tiny.workdir import digest_of, write_atomically

_FILE = ("file", "size", "digest")  # what a shard's entry has beside its counts


def write_description(
    folder: epath.Path,
    names: list[str],
    results: list[dict[str, Any]],
    left_out: dict[str, Any],
    tokenizer: Tokenizer,
    sequence_length: int,
) -> None:
    """Sums the results of all units up and writes what makes the folder a dataset.

    Args:
      names: of the sources, in order.
      results: of every unit, in order: its `source`, and the entries of its `splits`.
      left_out: `skipped` documents and `left_out` files, as dataset.json holds them.
    """
    splits = {split: _describe_split(split, names, results) for split in SPLITS}
    if not splits["train"]["rows"]:
        raise UserError(
            f"text has no document to train on: {splits['held_out']['documents']} are held out,"
            f" {count_skipped(left_out['skipped'])}"
        )
    description: dict[str, Any] = {
        "packing": rows.PACKING,
        "sequence_length": sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "begin_id": tokenizer.begin_id,
        "end_id": tokenizer.end_id,
        "tokenizer_digest": tokenizer.digest,
    }
    contents = [
        [(names.index(shard["source"]), shard["digest"]) for shard in split["shards"]]
        for split in splits.values()
    ]
    description |= {
        "digest": digest_of([description, contents]),
        "sources": names,
        **left_out,
        "splits": splits,
    }
    _write_tfds_metadata(folder, description, results)
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1))


def report(dataset: TokenDataset) -> str:
    """A few lines that account for every document and token."""
    description = dataset.description
    lines = [
        f"dataset {dataset.path}: rows of {dataset.sequence_length:,} targets,"
        f" {dataset.vocab_size:,} pieces, digest {dataset.digest[:12]}"
    ]
    for name, split in description["splits"].items():
        counts = [(name, split)]
        if len(dataset.sources) > 1:
            counts += [(f"  {source}", split["sources"][source]) for source in dataset.sources]
        lines += [f"  {label:<12} {_report_counts(c, dataset)}" for label, c in counts]
    for name in dataset.sources:
        entries = (split["sources"][name] for split in description["splits"].values())
        lines += unknown_lines(name, *entries)
    documents, size = (
        sum(split[kind] for split in description["splits"].values())
        for kind in ("documents", "bytes")
    )
    lines += skipped_lines(description["skipped"], documents, size)
    lines += left_out_lines(description.get("left_out", {}))  # earlier versions left it unsaid
    return "\n".join(lines)


def _report_counts(counts: dict[str, Any], dataset: TokenDataset) -> str:
    if not counts["rows"]:
        return "nothing"
    padding = counts["padding"] / (counts["rows"] * (dataset.sequence_length + 1))
    line = (
        f"{counts['documents']:,} documents, {counts['bytes'] / 1e6:,.2f} MB:"
        f" {counts['tokens']:,} tokens packed into {counts['rows']:,} rows,"
        f" {counts['cut_documents']:,} documents cut, {padding:.2%} padding,"
        f" {counts['bytes'] / counts['tokens']:.2f} bytes a token"
    )
    if "gzip_bytes" in counts:
        gzip, xz = (8 * counts[f"{kind}_bytes"] / counts["bytes"] for kind in ("gzip", "xz"))
        line += f"; gzip -9 {gzip:.3f} and xz -9 {xz:.3f} bits a byte"
    return line


def _describe_split(split: str, names: list[str], results: list[dict[str, Any]]) -> dict[str, Any]:
    entries = [(result["source"], result["splits"][split]) for result in results]
    kinds = [kind for kind in entries[0][1] if kind not in _FILE]

    def total(source: str | None) -> dict[str, int]:
        chosen = [entry for name, entry in entries if source in (None, name)]
        return {kind: sum(entry[kind] for entry in chosen) for kind in kinds}

    return {
        **total(None),
        "sources": {name: total(name) for name in names},
        "shards": [{"source": name, **entry} for name, entry in entries if entry["rows"]],
    }


def _write_tfds_metadata(
    folder: epath.Path, description: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    import tensorflow_datasets as tfds

    dtype = records.row_dtype(description["vocab_size"])
    row_length = description["sequence_length"] + 1
    split_infos = []
    for split, counts in description["splits"].items():
        # A unit without a row in this split has no file, and TFDS opens none of length 0.
        lengths = [result["splits"][split]["rows"] for result in results]
        if any(lengths):
            split_infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=counts["rows"] * row_length * dtype.itemsize,
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=records.tfds_features(row_length, dtype),
        split_infos=split_infos,
        check_data=False,
    )
