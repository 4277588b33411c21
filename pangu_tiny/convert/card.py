"""The model card of an export: what a person and the hub read of a model."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.convert.llama import needs_code

_MODULES = "https://arxiv.org/abs/2312.17276"
_RECIPE = "https://arxiv.org/abs/2402.02791"


class Told(NamedTuple):
    """What a card tells of.

    Attributes:
      dtype: of the tensors that are exported.
      dataset: what dataset.json says of the rows it was trained on; None where it is not given.
      evaluation, benchmark: what these stages found; None where it is not given.
    """

    checkpoint: Checkpoint
    dtype: str
    dataset: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    benchmark: dict[str, Any] | None


def card(told: Told) -> str:
    """README.md, in Markdown; its front matter is what the hub reads."""
    shape, about = told.checkpoint.shape, told.checkpoint.about
    modules = shape.series_terms > 1 or shape.shortcut_ratio
    loading = ", trust_remote_code=True" if needs_code(shape) else ""
    recipe = _recipe_rows(about)
    blocks = f"with the modules of [PanGu-π]({_MODULES})" if modules else "of plain LLaMA blocks"
    trained = f"trained by the recipe of [PanGu-π Pro]({_RECIPE})" if recipe else "exported"
    sections = [
        _front_matter(),
        f"# A language model of {_millions(shape.parameters)} parameters",
        f"A decoder {blocks}, {trained} with pangu_tiny.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained(PATH{loading})\n"
        "tokenizer = AutoTokenizer.from_pretrained(PATH)\n```",
        "## Shape",
        _table(("", ""), _shape_rows(told)),
        "## Tokenizer",
        f"{_tokenizer(told.checkpoint)}, sha256 `{about['identity']['tokenizer']}`.",
        "## Parameters",
        _table(
            ("part", "parameters"),
            [(part, f"{count:,}") for part, count in shape.parameters_by_part().items() if count]
            + [("all", f"{shape.parameters:,}")],
        ),
    ]
    if told.dataset:
        sections += ["## Data", _table(_DATA, _data_rows(told.dataset))]
    if recipe:
        sections += ["## Training", _table(("", ""), recipe)]
    if told.evaluation:
        sections += ["## Held-out loss", _table(_LOSSES, _loss_rows(told.evaluation))]
    if told.benchmark:
        sections += ["## Benchmarks", _table(_SCORES, _score_rows(told.benchmark)), _RULE]
    environment = about["environment"]
    versions = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    if environment.get("commit"):
        versions.append(f"commit {environment['commit']}")
    sections += ["## Versions", ", ".join(versions) + "."]
    return "\n\n".join(sections) + "\n"


def _tokenizer(checkpoint: Checkpoint) -> str:
    tokenizer = checkpoint.tokenizer()
    kind = "Tokenizer.json" if checkpoint.has_whole_vocabulary else "SentencePiece BPE"
    return f"{kind}, {tokenizer.vocab_size:,} ids"


def _front_matter() -> str:
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


def _recipe_rows(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a training; none for what was imported or cut."""
    identity = about["identity"]
    if "optimizer" not in identity:
        return []
    optimizer, step = identity["optimizer"], about["step"]
    whole = "" if step == identity["steps"] else f" of {identity['steps']:,}"
    batch = identity["global_batch"] * identity["sequence_length"]
    return [
        ("steps", f"{step:,}{whole}"),
        ("tokens a step", f"{batch:,}"),
        ("tokens", f"{batch * step:,}"),
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


_SCORES = ("benchmark", "split", "questions", "metric", "score", "chance")
_RULE = (
    "As OpenCompass scores them: choices by the cross-entropy of whole texts, divided by their"
    " tokens; the rest by what is written. Those of lm-eval by its own rules."
)


def _score_rows(benchmark: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            task["title"],
            task["split"],
            f"{task['questions']:,}" + (f" of {task['published']:,}" if task["published"] else ""),
            task["metric"],
            f"{task['score']:.2f}",
            "" if task["chance"] is None else f"{task['chance']:.2f}",
        )
        for task in benchmark["tasks"].values()
    ]
    for name, task in benchmark["lm_eval"].items():
        if task["score"] is not None:
            count = "" if task["questions"] is None else f"{task['questions']:,}"
            rows.append((name, "", count, task["metric"], f"{task['score']:.2f}", ""))
    if benchmark["average"] is not None:
        rows.append(("average", "", "", "", f"{benchmark['average']:.2f}", ""))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
