"""The report of a recipe: one HTML file with its figures, curve and samples inside."""

import html
import itertools
import json
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.page import page, paragraph, picture, section, table
from pangu_tiny.rounds.forgetting import by_part, forgetting_section, seen_losses
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.training.metrics import read_metrics
from pangu_tiny.workdir import environment, read_json, write_atomically


def write_report(
    folder: epath.Path, dataset: str, result: dict[str, Any], samples: list[tuple[str, str]]
) -> epath.Path:
    """Writes `report.json` and `report.html` from a recipe's folder, its dataset, evaluation and
    samples, each a prompt and the text that begins with it. Running again, or going on after an
    interruption, gives the same `results`; what it was run on is apart from them."""
    data = TokenDataset.described(dataset).description
    path, model = folder / "report.html", folder / "model"
    count = sum(1 for _ in model.glob("round_*"))
    rounds = [model / f"round_{number}" for number in range(1, count + 1)]
    identities = [read_json(one / "identity.json") for one in rounds]
    first = identities[0]
    results = {
        "model": first["model"],
        "parameters": ModelShape(**first["model"]).parameters,
        "dataset": first["dataset"],
        "tokenizer": first["tokenizer"],
        "steps": [one["steps"] for one in identities],
        "tokens_a_step": first["global_batch"] * first["sequence_length"],
        "evaluation": result,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
    }
    told = {"results": results, "run": environment()}
    write_atomically(folder / "report.json", json.dumps(told, indent=2, ensure_ascii=False))
    write_atomically(path, _page(model, data, identities, result, samples))
    return path


def _page(
    model: epath.Path,
    data: dict[str, Any],
    identities: list[dict[str, Any]],
    result: dict[str, Any],
    samples: list[tuple[str, str]],
) -> str:
    rounds = [model / f"round_{number}" for number in range(1, len(identities) + 1)]
    identity = identities[0]
    steps = [one["steps"] for one in identities]
    shape = ", ".join(f"{name} {value}" for name, value in identity["model"].items())
    train = data["splits"]["train"]
    facts = {
        "model": shape,
        "text": f"{train['bytes']:,} bytes in {train['documents']:,} documents, "
        f"{train['tokens']:,} tokens",
        "training": f"{' + '.join(f'{count:,}' for count in steps)} steps of "
        f"{identity['global_batch']} × {identity['sequence_length']} tokens",
    }
    scores = {
        "this model": result["bits_per_byte"],
        "gzip -9": result["gzip_9_bits_per_byte"],
        "xz -9": result["xz_9_bits_per_byte"],
    }
    continued = "".join(
        f"<pre><b>{html.escape(prompt)}</b>{html.escape(text[len(prompt) :])}</pre>"
        for prompt, text in samples
    )
    how = paragraph("The prompt in bold, the continuation as the model drew it.")
    drawn = [section("Samples", how, continued)] if samples else []
    return page(
        "A tiny language model",
        table(facts.items()),
        section(
            "Held-out text",
            paragraph(
                f"Bits per byte over {result['documents']} documents of {result['bytes']:,} bytes"
                " that were kept out of the training; the compressors take each document on its"
                " own. Lower is better."
            ),
            table((name, f"{value:.3f}") for name, value in scores.items()),
        ),
        section("Loss", picture(_curve(_all_metrics(rounds, steps), scores), "loss by step")),
        *_forgotten(model, rounds),
        *drawn,
    )


def _all_metrics(rounds: list[epath.Path], steps: list[int]) -> list[dict[str, Any]]:
    """The metrics of all rounds, their steps counted through."""
    starts = itertools.accumulate(steps, initial=0)
    return [
        {**line, "step": start + line["step"]}
        for start, one in zip(starts, rounds, strict=False)
        for line in read_metrics(one)
    ]


def _forgotten(model: epath.Path, rounds: list[epath.Path]) -> list[str]:
    """What was forgotten at the end of the first round, where there is a second."""
    if len(rounds) < 2:
        return []
    scores = Scores.open(model / "scores_2")
    return [forgetting_section(by_part(scores, seen_losses(rounds[0], scores.round.batches)))]


def _curve(metrics: list[dict[str, Any]], scores: dict[str, float]) -> Figure:
    """Training loss and held-out bits per byte by step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, held_out = figure.subplots(1, 2)
    trained = [line for line in metrics if "loss" in line]
    loss.plot([line["step"] + 1 for line in trained], [line["loss"] for line in trained], lw=1)
    loss.set(title="training loss", xlabel="step", ylabel="nats per token")
    scored = [line for line in metrics if "held_out_bits_per_byte" in line]
    held_out.plot(
        [line["step"] + 1 for line in scored],
        [line["held_out_bits_per_byte"] for line in scored],
        marker="o",
        ms=3,
        label="this model",
    )
    for name, style in (("gzip -9", "--"), ("xz -9", ":")):
        held_out.axhline(scores[name], ls=style, color="gray", label=name)
    held_out.set(title="held-out text", xlabel="step", ylabel="bits per byte")
    held_out.legend()
    for axes in (loss, held_out):
        axes.grid(alpha=0.3)
    return figure
