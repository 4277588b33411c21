"""What a cut won and what it lost, measured, as JSON, as a page and as a few lines."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pangu_tiny.model.shape import ModelShape
from pangu_tiny.page import page, paragraph, picture, section, table
from pangu_tiny.progress import Progress
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.unknown import unknown_lines
from pangu_tiny.vocabulary.counts import Counts
from pangu_tiny.vocabulary.id_map import Cut
from pangu_tiny.vocabulary.pieces import Vocabulary

_SIZES = (8_000, 16_000, 24_000, 32_000, 48_000, 72_000, 100_000)  # the paper's, and 24k
_EXAMPLES = 40


def embedding_share(model: ModelShape, vocab_size: int) -> float:
    """The share of the parameters that lies in embedding and head."""
    sized = dataclasses.replace(model, vocab_size=vocab_size)
    parts = sized.parameters_by_part()
    return (parts["embedding"] + parts["head"]) / sized.parameters


def digest(texts: list[str]) -> str:
    """sha256 of some documents in their order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text.encode()).digest())
    return found.hexdigest()


def measure(
    cut: Cut,
    paper: Cut,
    compact: Tokenizer,
    size: int,
    counts: Counts,
    texts: dict[str, list[str]],
    model: ModelShape | None,
) -> dict[str, Any]:
    """All figures of the report.

    Args:
      cut: what was cut, and by what.
      paper: the same by the published rule, for comparison.
      compact: the result, of `size` pieces.
      counts: what the cut was decided by.
      texts: held-out documents by source; may be empty.
      model: the shape that the tokenizer is for; without one, no figures of parameters.
    """
    big = cut.tokenizer
    before = {name: _tokens(big, found) for name, found in texts.items()}
    after = {name: _tokens(compact, found) for name, found in texts.items()}
    sizes = sorted({n for n in (*_SIZES, size) if cut.smallest <= n <= big.vocab_size})
    trade_off = []
    with Progress("measuring", 2 * len(sizes), "tokenizer") as progress:
        for n in sizes:
            row = {"size": n, "coverage": _coverage(cut, n)}
            row |= _at_equal_parameters(model, size, n) if model else {}
            for name, other in {"this": cut, "paper": paper}.items():
                tokenizer = other.compact(n) if n >= other.smallest else None
                row |= {
                    f"{name}_dead": tokenizer and int(tokenizer.dead.sum()),
                    f"{name}_tokens": sum(_tokens(tokenizer, found) for found in texts.values())
                    if tokenizer and texts
                    else None,
                }
                progress.update()
            trade_off.append(row)
    return {
        "tokenizer": {"digest": big.digest, "size": big.vocab_size, "dead": int(big.dead.sum())},
        "compact": {"digest": compact.digest, "size": size, "dead": int(compact.dead.sum())},
        "counts": {
            "digest": counts.digest,
            "tokens": int(cut.times.sum()),
            "sources": counts.sources,
        },
        "coverage": _coverage(cut, size),
        "held_out": {
            name: {
                "documents": len(found),
                "bytes": _bytes(found),
                "tokens_before": before[name],
                "tokens_after": after[name],
            }
            for name, found in texts.items()
        },
        **({"parameters": _parameters(model, big.vocab_size, size)} if model else {}),
        "trade_off": trade_off,
        "lost": _lost(cut, compact, size),
    }


def summary(folder: str, found: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [
        f"tokenizer {folder}/tokenizer.model: {found['tokenizer']['size']:,} →"
        f" {found['size']:,} pieces by {found['method']}, digest {found['compact']['digest'][:12]}",
        f"  coverage     {found['coverage']:.2%} of {found['counts']['tokens']:,} counted tokens",
        f"  dead pieces  {found['tokenizer']['dead']:,} → {found['compact']['dead']:,}",
    ]
    if of := found.get("parameters"):
        lines.append(
            f"  parameters   {of['before'] / 1e6:,.1f}M → {of['after'] / 1e6:,.1f}M,"
            f" embedding and head {of['share_before']:.1%} → {of['share_after']:.1%}"
        )
    for name, entry in found["held_out"].items():
        lines.append(
            f"  {name:<12} {_per_token(entry, 'before')} → {_per_token(entry, 'after')} bytes a"
            f" token held out, {_increase(entry):+.3%} tokens"
        )
    if not found["held_out"]:
        lines.append("  not measured on text; compress_tokenizer.text gives some")
    if found["huggingface"] is None:
        lines.append(f"  no Hugging Face files: {found['huggingface_refused']}")
    for name, source in found["counts"]["sources"].items():
        lines += unknown_lines(name, source)
    return "\n".join([*lines, f"  report       {folder}/report.html"])


def page_of(found: dict[str, Any], cut: Cut) -> str:
    """The report as one HTML page."""
    parameters = found.get("parameters")
    facts = {
        "pieces": f"{found['tokenizer']['size']:,} → {found['size']:,}",
        "method": found["method"],
        "coverage": f"{found['coverage']:.3%} of {found['counts']['tokens']:,} counted tokens",
        "dead pieces": f"{found['tokenizer']['dead']:,} → {found['compact']['dead']:,}",
    }
    if parameters:
        facts |= {
            "parameters": f"{parameters['before']:,} → {parameters['after']:,}",
            "embedding and head": f"{parameters['share_before']:.2%} →"
            f" {parameters['share_after']:.2%} of them",
        }
    sections = [table(facts.items())]
    if found["held_out"]:
        sections.append(
            section(
                "Held-out text",
                table(
                    (
                        (
                            name,
                            f"{entry['bytes']:,}",
                            _per_token(entry, "before"),
                            _per_token(entry, "after"),
                            f"{_increase(entry):+.3%}",
                        )
                        for name, entry in found["held_out"].items()
                    ),
                    ("source", "bytes", "bytes a token before", "after", "tokens"),
                ),
            )
        )
    sections += [
        section(
            "Sizes",
            paragraph(
                "What a vocabulary of each size costs in tokens (held out, against the whole"
                " tokenizer), by this method and by deleting what is rare, as the paper does"
                + (
                    "; and how deep a model of the same width and the same number of parameters"
                    " can be with it."
                    if parameters
                    else "."
                )
            ),
            table(
                (_trade_off_line(row, found) for row in found["trade_off"]),
                (
                    "pieces", "coverage", *(["depth", "embedding and head"] if parameters else []),
                    "tokens", "dead", "paper: tokens", "dead",
                ),
            ),
            picture(_plot(found, cut), "coverage and tokens by size"),
        ),
        section(
            "What was lost",
            paragraph("The pieces that were counted most often among those that went."),
            table(
                (
                    (entry["piece"], f"{entry['times']:,}", " ".join(entry["becomes"]))
                    for entry in found["lost"]
                ),
                ("piece", "times", "becomes"),
            ),
        ),
    ]  # fmt: skip
    return page("A compact tokenizer", *sections)


def _trade_off_line(row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    before = sum(entry["tokens_before"] for entry in found["held_out"].values())

    def increase(tokens: int | None) -> str:
        return f"{tokens / before - 1:+.3%}" if tokens else "–"

    cells = [f"{row['size']:,}", f"{row['coverage']:.2%}"]
    if "parameters" in found:
        cells += [f"{row['depth']}", f"{row['share']:.1%}"]
    for name in ("this", "paper"):
        dead = row[f"{name}_dead"]
        cells += [increase(row[f"{name}_tokens"]), "–" if dead is None else f"{dead:,}"]
    return cells


def _plot(found: dict[str, Any], cut: Cut) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    coverage, tokens = figure.subplots(1, 2)
    shares = cut.coverage()
    coverage.plot(np.arange(cut.smallest, cut.smallest + len(shares)), shares)
    coverage.plot(found["size"], found["coverage"], "o")
    coverage.annotate(
        f"{found['size']:,}: {found['coverage']:.2%}",
        (found["size"], found["coverage"]),
        textcoords="offset points",
        xytext=(8, -14),
    )
    coverage.set(title="coverage", xlabel="pieces", ylabel="of the counted tokens")
    before = sum(entry["tokens_before"] for entry in found["held_out"].values())
    for name, label in (("this", found["method"]), ("paper", "paper")):
        rows = [row for row in found["trade_off"] if row[f"{name}_tokens"]]
        tokens.plot(
            [row["size"] for row in rows],
            [row[f"{name}_tokens"] / before - 1 for row in rows],
            marker="o",
            ms=3,
            label=label,
        )
    tokens.set(title="held-out text", xlabel="pieces", ylabel="more tokens")
    tokens.legend()
    for axes in (coverage, tokens):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    return figure


def _parameters(model: ModelShape, before: int, after: int) -> dict[str, Any]:
    """Of the model with a vocabulary of each size."""
    whole, sized = (dataclasses.replace(model, vocab_size=n) for n in (before, after))
    return {
        "before": whole.parameters,
        "after": sized.parameters,
        "share_before": embedding_share(model, before),
        "share_after": embedding_share(model, after),
    }


def _at_equal_parameters(model: ModelShape, size: int, other: int) -> dict[str, Any]:
    """The depth at which `other` pieces make as many parameters as the model has with `size`."""
    sized, resized = (dataclasses.replace(model, vocab_size=n) for n in (size, other))
    block = dataclasses.replace(model, depth=model.depth + 1).parameters - model.parameters
    depth = max(1, model.depth + round((sized.parameters - resized.parameters) / block))
    deep = dataclasses.replace(resized, depth=depth)
    return {
        "depth": depth,
        "parameters": deep.parameters,
        "share": embedding_share(deep, other),
    }


def _lost(cut: Cut, compact: Tokenizer, size: int) -> list[dict[str, Any]]:
    small = Vocabulary.of(compact)
    gone = cut.gone[: len(cut.vocabulary.pieces) - size]
    most = gone[np.argsort(-cut.times[gone], kind="stable")][:_EXAMPLES]
    return [
        {
            "piece": cut.vocabulary.pieces[i],
            "times": int(cut.times[i]),
            "becomes": [small.pieces[new] for new in small.emit(cut.vocabulary.pieces[i])],
        }
        for i in most
        if cut.times[i]
    ]


def _coverage(cut: Cut, size: int) -> float:
    return float(cut.times[cut.kept(size)].sum() / cut.times.sum())


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    return sum(map(len, tokenizer.encode_batch(texts)))


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _per_token(entry: dict[str, Any], when: str) -> str:
    return f"{entry['bytes'] / entry[f'tokens_{when}']:.3f}"


def _increase(entry: dict[str, Any]) -> float:
    return entry["tokens_after"] / entry["tokens_before"] - 1
