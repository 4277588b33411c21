"""What a cut won and what it lost: measured, as JSON, and as a report."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pangu_tiny.model.shape import ModelShape
from pangu_tiny.page import Report, paragraph, picture, section, table
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
    figures = hashlib.sha256()
    for text in texts:
        figures.update(hashlib.sha256(text.encode()).digest())
    return figures.hexdigest()


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
      paper: the same by the published rule, for comparison.
      compact: the result, of `size` pieces.
      texts: held-out documents by source; may be empty.
      model: the shape that the tokenizer is for; without one, no figures of parameters.
    """
    big = cut.tokenizer
    sizes = sorted({n for n in (*_SIZES, size) if cut.smallest <= n <= big.vocab_size})
    trade_off = []
    with Progress("measuring", 2 * len(sizes), "tokenizer") as progress:
        for n in sizes:
            row: dict[str, Any] = {"size": n, "coverage": _coverage(cut, n)}
            row |= _at_equal_parameters(model, size, n) if model else {}
            for name, other in {"this": cut, "paper": paper}.items():
                tokenizer = other.compact(n) if n >= other.smallest else None
                row |= {
                    f"{name}_dead": tokenizer and int(tokenizer.unreachable.sum()),
                    f"{name}_tokens": sum(
                        _tokens(tokenizer, documents) for documents in texts.values()
                    )
                    if tokenizer and texts
                    else None,
                }
                progress.update()
            trade_off.append(row)
    return {
        "tokenizer": {
            "digest": big.digest,
            "size": big.vocab_size,
            "dead": int(big.unreachable.sum()),
        },
        "compact": {"digest": compact.digest, "size": size, "dead": int(compact.unreachable.sum())},
        "counts": {
            "digest": counts.digest,
            "tokens": int(cut.times.sum()),
            "sources": counts.sources,
        },
        "coverage": _coverage(cut, size),
        "held_out": {
            name: {
                "documents": len(documents),
                "bytes": sum(len(text.encode()) for text in documents),
                "tokens_before": _tokens(big, documents),
                "tokens_after": _tokens(compact, documents),
            }
            for name, documents in texts.items()
        },
        **({"parameters": _parameters(model, big.vocab_size, size)} if model else {}),
        "trade_off": trade_off,
        "lost": _lost(cut, compact, size),
    }


def facts(figures: dict[str, Any]) -> dict[str, str]:
    """What was measured, in a few lines."""
    parameters = figures.get("parameters")
    lines = {
        "pieces": f"{figures['tokenizer']['size']:,} → {figures['size']:,} by {figures['method']}",
        "coverage": f"{figures['coverage']:.2%} of {figures['counts']['tokens']:,} counted tokens",
        "unreachable": f"{figures['tokenizer']['dead']:,} → {figures['compact']['dead']:,} pieces",
    }
    if parameters:
        lines["parameters"] = (
            f"{parameters['before'] / 1e6:,.1f}M → {parameters['after'] / 1e6:,.1f}M, embedding and"
            f" head {parameters['share_before']:.1%} → {parameters['share_after']:.1%}"
        )
    for name, entry in figures["held_out"].items():
        before, after = (
            f"{entry['bytes'] / entry[f'tokens_{when}']:.3f}" for when in ("before", "after")
        )
        increase = entry["tokens_after"] / entry["tokens_before"] - 1
        lines[f"text {name}"] = f"{before} → {after} bytes a token held out, {increase:+.3%} tokens"
    if not figures["held_out"]:
        lines["held out"] = "not measured; compress_tokenizer.text gives text to measure on"
    if figures["huggingface"] is None:
        lines["Hugging Face"] = f"no files: {figures['huggingface_refused']}"
    return lines


def report_of(figures: dict[str, Any], cut: Cut) -> Report:
    parameters = "parameters" in figures
    explained = (
        "What a vocabulary of each size costs in tokens (held out, against the whole tokenizer), by"
        " this method and by deleting what is rare, as the paper does"
        + ("; and how deep a model of the same width and size can be with it" if parameters else "")
    )
    sizes = ["depth", "embedding and head"] if parameters else []
    head = ["pieces", "coverage", *sizes, "tokens", "unreachable", "paper: tokens", "unreachable"]
    sections = [
        section(
            "Sizes",
            paragraph(explained),
            table((_trade_off_line(row, figures) for row in figures["trade_off"]), head),
            picture(_plot(figures, cut), "coverage and tokens by size"),
        ),
        section(
            "What was lost",
            paragraph("The pieces that were counted most often among those that went."),
            table(
                (
                    (entry["piece"], f"{entry['times']:,}", " ".join(entry["becomes"]))
                    for entry in figures["lost"]
                ),
                ("piece", "times", "becomes"),
            ),
        ),
    ]
    return Report("A compact tokenizer", facts(figures), unknown(figures), sections)


def unknown(figures: dict[str, Any]) -> list[str]:
    """What the tokenizer does not know of what was counted."""
    sources = figures["counts"]["sources"].items()
    return [line for name, source in sources for line in unknown_lines(name, source)]


def _trade_off_line(row: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    before = sum(entry["tokens_before"] for entry in figures["held_out"].values())

    def increase(tokens: int | None) -> str:
        return f"{tokens / before - 1:+.3%}" if tokens else "–"

    cells = [f"{row['size']:,}", f"{row['coverage']:.2%}"]
    if "parameters" in figures:
        cells += [f"{row['depth']}", f"{row['share']:.1%}"]
    for name in ("this", "paper"):
        dead = row[f"{name}_dead"]
        cells += [increase(row[f"{name}_tokens"]), "–" if dead is None else f"{dead:,}"]
    return cells


def _plot(figures: dict[str, Any], cut: Cut) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    coverage, tokens = figure.subplots(1, 2)
    shares = cut.coverage()
    coverage.plot(np.arange(cut.smallest, cut.smallest + len(shares)), shares)
    coverage.plot(figures["size"], figures["coverage"], "o")
    coverage.annotate(
        f"{figures['size']:,}: {figures['coverage']:.2%}",
        (figures["size"], figures["coverage"]),
        textcoords="offset points",
        xytext=(8, -14),
    )
    coverage.set(title="coverage", xlabel="pieces", ylabel="of the counted tokens")
    before = sum(entry["tokens_before"] for entry in figures["held_out"].values())
    for name, label in (("this", figures["method"]), ("paper", "paper")):
        rows = [row for row in figures["trade_off"] if row[f"{name}_tokens"]]
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
