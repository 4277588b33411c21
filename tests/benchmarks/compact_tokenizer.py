"""How much longer text becomes with a compact tokenizer, by method and size, on real tokenizers.

python tests/benchmarks/compact_tokenizer.py --data=FOLDER

FOLDER holds `tokenizers/*.model` and `corpora/*.jsonl` (key `text`). Nine tenths of the documents
are counted, a tenth is held out by the rule of all stages; on every tenth of what is counted a
tokenizer of this project is trained, which is cut too. For every cut it prints the increase in
held-out tokens against the whole tokenizer, the unreachable pieces and the seconds that it takes on
one core, and then checks on every held-out line, and on fuzzed ones, that decoding gives what the
whole tokenizer gives, that Hugging Face gives the same ids (user-defined pieces and marks written
as text put into the lines), and that mapping ids of an `unused` cut equals encoding again.
"""

import argparse
import json
import pathlib
import random
import tempfile
import time

import tokenizers

from pangu_tiny.errors import UserError
from pangu_tiny.text.documents import held_out
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer
from pangu_tiny.vocabulary import huggingface
from pangu_tiny.vocabulary.count_tokens import count_tokens
from pangu_tiny.vocabulary.counts import read_counts
from pangu_tiny.vocabulary.id_map import TOKENIZER, Cut, IdMap, id_map
from pangu_tiny.vocabulary.pieces import Vocabulary
from pangu_tiny.vocabulary.prune import METHODS

SIZES = {103168: (48000, 24000), 32000: (16000,)}
TRAINED = 16384
HELD_OUT = 0.1


def documents_of(corpora: list[str]) -> tuple[list[str], list[str]]:
    """Those that are counted, and those that are held out."""
    parts: tuple[list[str], list[str]] = [], []
    for file in corpora:
        for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            parts[held_out(text, HELD_OUT)].append(text)
    return parts


def fuzzed(count: int, special: list[str]) -> list[str]:
    draw = random.Random(0)
    atoms = ["\u2581", " ", "   ", "\0", "\x01", "\n", "\t", "🙂", "é", "世", "the", *special]
    return [
        "".join(
            draw.choice([*atoms, chr(draw.randrange(1, 0xD7FF)), chr(draw.randrange(2**16, 2**20))])
            for _ in range(draw.randrange(24))
        )
        for _ in range(count)
    ]


def check(cut: Cut, compact: Tokenizer, size: int, method: str, lines: list[str]) -> str:
    """One line of findings; raises nothing, so that all methods are seen."""
    whole = cut.tokenizer
    kinds = (proto.CONTROL, proto.UNKNOWN, proto.USER_DEFINED)
    special = [whole.piece(i) for i, kind in enumerate(whole.kinds) if kind in kinds]
    draw = random.Random(0)
    mixed = []
    for line in lines:
        place = draw.randrange(len(line) + 1)
        mixed.append(line[:place] + draw.choice(special) + line[place:])
    texts = [*lines, *mixed, *fuzzed(len(lines), special)]
    old, new = whole.encode_batch(texts), compact.encode_batch(texts)
    found = [f"{len(texts):,} lines"]
    pairs = zip(old, new, strict=True)
    wrong = sum(whole.decode(a.tolist()) != compact.decode(b.tolist()) for a, b in pairs)
    found.append(f"{wrong} decode otherwise")
    if cut.merged_through:
        with tempfile.TemporaryDirectory() as folder:
            table = pathlib.Path(folder) / "id_map.json"
            table.write_text(json.dumps(id_map(cut, compact, size, method)))
            (table.parent / TOKENIZER).write_bytes(compact.model_bytes)
            mapping = IdMap.open(folder)
            wrong = sum(
                mapping.map(a).tolist() != b.tolist() for a, b in zip(old, new, strict=True)
            )
        found.append(f"{wrong} map otherwise")
    else:
        try:
            other = tokenizers.Tokenizer.from_str(huggingface.export(compact)["tokenizer.json"])
        except UserError as error:
            return f"{', '.join(found)}; {error}"
        other.encode_special_tokens = True
        encoded = other.encode_batch(texts, add_special_tokens=False)
        wrong = sum(a.ids != b.tolist() for a, b in zip(encoded, new, strict=True))
        found.append(f"{wrong} differ in Hugging Face")
    return ", ".join(found)


def main(data: pathlib.Path) -> None:
    corpora = sorted(map(str, (data / "corpora").glob("*.jsonl")))
    counted, documents = documents_of(corpora)
    lines = [line for text in documents for line in text.split("\n")]
    print("| tokenizer | pieces | method | more held-out tokens | unreachable pieces | seconds |")
    print("|---|---|---|---|---|---|")
    notes = []
    files = sorted((data / "tokenizers").glob("*.model"))
    trained = pathlib.Path(tempfile.mkdtemp()) / "trained.model"
    trained.write_bytes(train_tokenizer(counted[::10], TRAINED).model_bytes)
    for file in [*files, trained]:
        whole = Tokenizer.open(file)
        try:
            Vocabulary.of(whole)
        except UserError as error:
            notes.append(str(error))
            continue
        with tempfile.TemporaryDirectory() as folder:
            workdir = f"{folder}/counts"
            count_tokens(workdir, corpora, str(file), held_out_fraction=HELD_OUT)
            times = read_counts(workdir, whole).times
        before = sum(map(len, whole.encode_batch(documents)))
        for size in SIZES.get(whole.vocab_size, (whole.vocab_size // 2,)):
            for method in METHODS:
                start = time.process_time()
                cut = Cut.plan(whole, Vocabulary.of(whole), times, method)
                compact = cut.compact(size)
                seconds = time.process_time() - start
                unreachable = compact.unreachable.sum()
                after = sum(map(len, compact.encode_batch(documents)))
                print(
                    f"| {file.stem} | {whole.vocab_size:,} → {size:,} | {method} |"
                    f" {after / before - 1:+.3%} | {unreachable:,} | {seconds:.1f} |"
                )
                notes.append(
                    f"{file.stem} {size} {method}: {check(cut, compact, size, method, lines)}"
                )
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    main(parser.parse_args().data)
