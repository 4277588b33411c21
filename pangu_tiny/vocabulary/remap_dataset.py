"""The stage that turns a token dataset into one of a compact tokenizer, without its text.

Every shard's token stream is rebuilt from its rows, its ids are replaced by those that they become,
and it is packed again. For a tokenizer that was cut by `unused` the result is the dataset that
prepare-data would make of the text, row by row.
"""

import dataclasses
import functools
import json
import re
from typing import Any

from pangu_tiny.data.dataset import DESCRIPTION, TOKENIZER, TokenDataset, open_once
from pangu_tiny.data.describe import report, write_description
from pangu_tiny.data.shards import SPLITS, ShardWriter, shard_name
from pangu_tiny.errors import UserError
from pangu_tiny.jobs import Job, Workers, remove_results, run_jobs
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary.id_map import IdMap
from pangu_tiny.workdir import check_same, claim, read_identity, read_json, write_atomically

_FLUSH = 2**20  # ids


def remap_dataset(
    dataset: str,
    tokenizer: str,
    workdir: str,
    approximate: bool = False,
    processes: int | None = None,
) -> dict[str, Any]:
    """Replaces the ids of a dataset by those of a compact tokenizer.

    Args:
      dataset: a folder that prepare-data wrote with the big tokenizer.
      tokenizer: a folder that compress-tokenizer wrote.
      workdir: the folder to write, local or gs://. An interrupted run resumes in it.
      approximate: takes a tokenizer by "flow" or "paper" too, which writes some text otherwise:
        its model then trains on ids that its tokenizer would not give.
      processes: worker processes; all cores by default.
    """
    workers = Workers("remap_dataset", processes)
    old = TokenDataset.open(dataset)
    id_map = IdMap.open(tokenizer)
    written = f"dataset {dataset} was written with the tokenizer"
    cut = f"{tokenizer} was cut out of"
    check_same(written, old.tokenizer_digest, cut, id_map.old_digest)
    if not (id_map.exact or approximate):
        raise UserError(
            f"{tokenizer} was cut by {id_map.method!r}, whose ids do not follow from those of the"
            " big tokenizer: prepare the text again, cut by 'unused', or bind"
            " remap_dataset.approximate = True"
        )
    compact = id_map.tokenizer()
    folder = claim(
        workdir,
        "remap-dataset",
        {
            "dataset_digest": old.digest,
            "tokenizer_digest": compact.digest,
            "held_out_fraction": (read_identity(dataset) or {}).get("held_out_fraction"),
        },
    )
    if not (folder / DESCRIPTION).exists():
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if not (folder / TOKENIZER).exists():
            write_atomically(folder / TOKENIZER, compact.model_bytes)
        jobs = _jobs(old, id_map, workdir)
        run_jobs(jobs, compact, workers, "mapping")
        results = [read_json(job.result) for job in jobs]
        left_out: dict[str, Any] = {
            name: old.description[name]
            for name in ("skipped", "left_out")
            if name in old.description
        }
        write_description(folder, old.sources, results, left_out, compact, old.sequence_length)
    remove_results(folder)
    new = TokenDataset.described(workdir)
    print(report(new))
    return new.description


@dataclasses.dataclass(frozen=True)
class UnitJob(Job):
    """What one unit of text, of `count`, became: at most one shard of each split, by its number
    there."""

    count: int
    source: str
    shards: dict[str, int]
    size: int
    dataset: str
    dataset_digest: str
    tokenizer: str
    tokenizer_digest: str

    def run(self, tokenizer: Tokenizer) -> None:
        """Writes the new shards and the result."""
        old = open_once(self.dataset, self.dataset_digest)
        id_map = _open_map(self.tokenizer, self.tokenizer_digest)
        splits = {}
        for split in SPLITS:
            name = shard_name(split, self.index, self.count)
            writer = ShardWriter(self.workdir, name, old.sequence_length, tokenizer)
            entry = dict.fromkeys(_sizes(old, split), 0)
            if split in self.shards:
                number = self.shards[split]
                found = old.description["splits"][split]["shards"][number]
                entry = {kind: found[kind] for kind in entry}
                waiting = 0
                for _, ids in old.documents(split, [number]):
                    writer.add(id_map.map(ids[1:-1]))
                    waiting += len(ids)
                    if waiting >= _FLUSH:
                        writer.flush()
                        waiting = 0
            new = writer.finish()
            # Ids tell nothing of the text that the unknown piece stands for, but all text is what
            # it was. (A dataset of an earlier version does not say how much that is.)
            written = new["normalised_bytes"]
            lost = entry.get("normalised_bytes", written) - written
            new |= {name: new[name] + lost for name in ("normalised_bytes", "unknown_bytes")}
            splits[split] = entry | new
        write_atomically(self.result, json.dumps({"source": self.source, "splits": splits}))


@functools.lru_cache(maxsize=1)
def _open_map(folder: str, digest: str) -> IdMap:
    return IdMap.open(folder)


def _sizes(dataset: TokenDataset, split: str) -> list[str]:
    """The names of the sizes of text in a split's entries, which stay as they are."""
    return [name for name in dataset.description["splits"][split] if name.endswith("bytes")]


def _jobs(dataset: TokenDataset, id_map: IdMap, workdir: str) -> list[UnitJob]:
    """One for every unit of text, those without a row too: TFDS counts them."""
    units: dict[int, tuple[str, dict[str, int]]] = {}
    sizes: dict[int, int] = {}
    count = 1
    for split in SPLITS:
        for number, shard in enumerate(dataset.description["splits"][split]["shards"]):
            index, count = map(int, re.search(r"-(\d+)-of-(\d+)$", shard["file"]).groups())
            units.setdefault(index, (shard["source"], {}))[1][split] = number
            sizes[index] = sizes.get(index, 0) + shard["size"]
    jobs = []
    for index in range(count):
        source, shards = units.get(index, (dataset.sources[0], {}))
        jobs.append(
            UnitJob(
                index, workdir, count, source, shards, sizes.get(index, 0), dataset.path,
                dataset.digest, id_map.folder, id_map.new_digest,
            )
        )  # fmt: skip
    return jobs
