"""The model card of an export: what a person and the hub read of a model."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pangu_tiny.checkpoints.read import Checkpoint

_MODULES = "https://arxiv.org/abs/2312.17276"
_RECIPE = "https://arxiv.org/abs/2402.02791"


class Told(NamedTuple):
    """What a card tells of.

    Attributes:
      dtype: of the tensors that are exported.
      dataset: what dataset.json says of the rows it was trained on; None where it is not given.
      evaluation: what evaluate found; None where it is not given.
    """

    checkpoint: Checkpoint
    dtype: str
    dataset: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def card(told: Told) -> str:
    """README.md, in Markdown; its front matter is what the hub reads."""
    shape, about = told.checkpoint.shape, told.checkpoint.about
    modules = shape.series_terms > 1 or shape.shortcut_ratio
    loading = ", trust_remote_code=True" if modules else ""
    sections = [
        _front_matter(told),
        f"# A language model of {_millions(shape.parameters)} parameters",
        f"Made with pangu_tiny, by the recipe of [PanGu-π Pro]({_RECIPE})"
        + (f", with the modules of [PanGu-π]({_MODULES})." if modules else ": plain LLaMA blocks."),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained(PATH{loading})\n"
        "tokenizer = AutoTokenizer.from_pretrained(PATH)\n```",
        "## Shape",
        _table(("", ""), _shape_rows(told)),
        "## Parameters",
        _table(
            ("part", "parameters"),
            [(part, f"{count:,}") for part, count in shape.parameters_by_part().items() if count]
            + [("all", f"{shape.parameters:,}")],
        ),
    ]
    if told.dataset:
        sections += ["## Data", _table(_DATA, _data_rows(told.dataset))]
    if recipe := _recipe_rows(about["identity"]):
        sections += ["## Training", _table(("", ""), recipe)]
    if told.evaluation:
        sections += ["## Held-out loss", _table(_LOSSES, _loss_rows(told.evaluation))]
    versions = about["environment"]["versions"]
    sections += [
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(told: Told) -> str:
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pangu_tiny", "pangu-pi"],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in facts.items()]
    return "\n".join(["---", *lines, "---"])


def _shape_rows(told: Told) -> list[tuple[str, str]]:
    shape, about = told.checkpoint.shape, told.checkpoint.about
    rows = [
        ("layers", f"{shape.depth}"),
        ("width", f"{shape.width}"),
        ("query heads", f"{shape.heads} of {shape.head_dim}"),
        ("key-value heads", f"{shape.kv_heads}"),
        ("feed-forward width", f"{shape.ffn_width}"),
        ("vocabulary", f"{shape.vocab_size:,}"),
        ("head", "tied to the embedding" if shape.tied else "its own matrix"),
        ("sequences up to", f"{about['sequence_length']:,} tokens"),
        ("tensors", told.dtype),
    ]
    if shape.series_terms > 1:
        rows.append(("series activation", f"{shape.series_terms} terms"))
    if shape.shortcut_ratio:
        rows.append(("augmented shortcut", f"bottleneck {shape.bottleneck}"))
    return rows


_DATA = ("source", "documents", "bytes", "tokens")


def _data_rows(dataset: dict[str, Any]) -> list[tuple[str, ...]]:
    train = dataset["splits"]["train"]
    sources = train["sources"] if len(train["sources"]) > 1 else {}
    return [
        (name, *(f"{counts[what]:,}" for what in _DATA[1:]))
        for name, counts in {**sources, "all": train}.items()
    ]


def _recipe_rows(identity: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a training; none for what was imported or cut."""
    if "optimizer" not in identity:
        return []
    optimizer = identity["optimizer"]
    batch = identity["global_batch"] * identity["sequence_length"]
    return [
        ("steps", f"{identity['steps']:,}"),
        ("tokens a step", f"{batch:,}"),
        ("tokens", f"{batch * identity['steps']:,}"),
        ("started from", "another checkpoint" if identity["checkpoint"] else "random parameters"),
        ("peak learning rate", f"{optimizer['learning_rate'] or 'by the batch'}"),
        ("weight decay", f"{optimizer['weight_decay']}"),
        ("numbers", identity["dtype"]),
    ]


_LOSSES = ("source", "nats a token", "bits a byte", "gzip -9, bits a byte")


def _loss_rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    sources = evaluation["sources"] if len(evaluation["sources"]) > 1 else {}
    names = ("nats_per_token", "bits_per_byte", "gzip_9_bits_per_byte")
    return [
        (source, *(f"{found[name]:.4f}" for name in names))
        for source, found in {**sources, "all": evaluation}.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
