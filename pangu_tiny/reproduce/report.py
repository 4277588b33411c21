"""The report of a recipe: one HTML file with its tables, plots and samples inside."""

import html
import itertools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from pangu_tiny.benchmark.results import beside_paper, by_lm_eval
from pangu_tiny.page import page, paragraph, picture, section, table, vector
from pangu_tiny.reproduce.results import Results
from pangu_tiny.reproduce.rungs import PROTOCOLS, RUNGS
from pangu_tiny.rounds.forgetting import by_part, forgetting_section, seen_losses
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.training.metrics import read_metrics
from pangu_tiny.workdir import environment, read_json, write_atomically


def write_report(folder: epath.Path, found: Results, ran: list[epath.Path], seconds: float) -> None:
    """Writes `report.json`, `report.html` and, of several rungs, the plot `ladder.svg`.

    Args:
      folder: of the recipe.
      ran: of the last rung's first model, whose training is shown, round by round.
      seconds: that the recipe took.
    """
    told = {"results": found.told, "run": {"seconds": seconds, **environment()}}
    write_atomically(folder / "report.json", json.dumps(told, indent=2, ensure_ascii=False))
    sections = [_recipe(found)]
    if len(found.recipe.rungs) > 1:
        plot = vector(_ladder_plot(found))
        write_atomically(folder / "ladder.svg", plot)
        sections += [plot, *(_ladder(found, protocol) for protocol in found.recipe.protocols)]
    else:
        sections += [_held_out(found, protocol) for protocol in found.recipe.protocols]
    if found.told["tuning"]:
        sections.append(_tuning(found.told["tuning"]))
    sections += [*_benchmarks(found), _curves(found, ran), *_forgotten(ran), *_samples(found)]
    write_atomically(folder / "report.html", page("Tiny language models", *sections))


def _benchmarks(found: Results) -> list[str]:
    """The columns of the paper's table, a row for each rung; what lm-eval told."""
    scores = found.told["benchmarks"]
    ours = {rung: of["tasks"] for rung, of in scores.items() if of["tasks"]}
    theirs = {
        f"{rung}: {n}": task for rung, of in scores.items() for n, task in of["lm_eval"].items()
    }
    return [*([beside_paper(ours)] if ours else []), *([by_lm_eval(theirs)] if theirs else [])]


def _recipe(found: Results) -> str:
    """What it was made of."""
    results = found.told
    facts = {}
    for name, text in results["text"].items():
        facts[f"text, {name} tokenizer"] = (
            f"{text['bytes']:,} bytes in {text['documents']:,} documents, {text['tokens']:,} "
            f"tokens of {text['pieces']:,} pieces, {text['bytes_a_token']:.3f} bytes a token"
        )
    for rung, told in results["rungs"].items():
        shape = ", ".join(f"{name} {value}" for name, value in told["model"].items())
        facts[f"model {rung}"] = f"{told['parameters']:,} parameters: {shape}"
    if teacher := results["teacher"]:
        tokens = teacher["tokens"]
        cost = f"trained here on {tokens:,} tokens, in no budget below" if tokens else "as given"
        facts["teacher"] = (
            f"{teacher['parameters']:,} parameters, {cost}; {teacher['bits_per_byte']:.3f} bits "
            f"per byte, what is cut out of it {teacher['bits_per_byte_after_the_cut']:.3f} before "
            f"any training"
        )
    return table(facts.items())


def _held_out(found: Results, protocol: str) -> str:
    line, values = found.lines[protocol][0], found.told["compressors"]
    rows = {"this model": str(line.spread)} | {k: f"{v:.3f}" for k, v in values.items()}
    title = f"Held-out text, protocol {protocol}"
    return section(title, paragraph(_MEASURED), table(rows.items()))


_MEASURED = (
    "Bits per byte of documents that were kept out of all training; the compressors take each "
    "document on its own. Lower is better."
)
_GAINS = "Gains are over the rung below, seed by seed, with their 95 % interval."
_HOLDS = (
    f"{_GAINS} A rung holds where its mean is not above that of the rung below by more than the "
    f"larger half of their ranges."
)


def _ladder(found: Results, protocol: str) -> str:
    """The rungs side by side."""
    sources = list(found.of_rung(found.recipe.rungs[0], protocol)[0]["sources"])
    sources = sources if len(sources) > 1 else []
    head = ("rung", "bits per byte", *sources, "gain", "holds", "rate", "tokens", "bytes", "adds")
    rows = []
    for number, line in enumerate(found.lines[protocol]):
        first = found.of_rung(line.rung, protocol)[0]
        holds = {None: "", True: "yes", False: "no"}[line.holds]
        rate = first["learning_rate"]
        rows.append(
            (
                line.rung,
                line.spread,
                *(found.by_source[protocol][name][number].spread for name in sources),
                line.gain or "",
                holds,
                "" if rate is None else f"{rate:g}",
                f"{first['tokens'] / 1e6:,.2f}M",
                f"{first['bytes'] / 1e6:,.2f}M",
                RUNGS[line.rung].adds,
            )
        )
    seeds = ", ".join(map(str, found.recipe.seeds))
    judged = _HOLDS if protocol == "equal" else _GAINS
    return section(
        f"Protocol {protocol}: {PROTOCOLS[protocol]}",
        paragraph(f"{_MEASURED} Means and half of the ranges over seeds {seeds}. {judged}"),
        table(rows, head),
        paragraph(f"{found.whole_gain(protocol)}."),
    )


def _ladder_plot(found: Results) -> Figure:
    """Every model, and the means."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (protocol, lines) in enumerate(found.lines.items()):
        shift = 0.12 * (place - (len(found.lines) - 1) / 2)
        color = f"C{place}"
        places = [number + shift for number in range(len(lines))]
        means = [line.spread.mean for line in lines]
        axes.plot(places, means, marker="o", ms=5, color=color, label=f"protocol {protocol}")
        for at, line in zip(places, lines, strict=True):
            for model in found.of_rung(line.rung, protocol):
                axes.plot(at, model["bits_per_byte"], "_", ms=12, color=color)
    axes.set_xticks(range(len(found.recipe.rungs)), found.recipe.rungs)
    axes.set(ylabel="held-out bits per byte")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    return figure


def _tuning(tuning: Mapping[str, Mapping[str, float | None]]) -> str:
    rates = sorted(next(iter(tuning.values())), key=float)
    rows = []
    for rung, tuned in tuning.items():
        finite = {rate: value for rate, value in tuned.items() if value is not None}
        best = min(finite, key=finite.__getitem__)
        edge = " (at the edge of the grid)" if best in (rates[0], rates[-1]) else ""
        tried = (f"{finite[rate]:.3f}" if rate in finite else "diverged" for rate in rates)
        rows.append((rung, *tried, f"{best}{edge}"))
    return section(
        "Peak learning rates",
        paragraph(
            "Bits per byte by the peak rate, of protocol equal on a seed that is not reported."
        ),
        table(rows, ("rung", *rates, "taken")),
    )


def _curves(found: Results, rounds: list[epath.Path]) -> str:
    steps = [read_json(one / "identity.json")["steps"] for one in rounds]
    metrics = _all_metrics(rounds, steps)
    return section(
        f"Training of {found.recipe.rungs[-1]}, seed {found.recipe.seeds[0]}",
        paragraph(f"{' + '.join(f'{count:,}' for count in steps)} steps."),
        picture(_curve(metrics, found.told["compressors"]), "loss by step"),
    )


def _all_metrics(rounds: list[epath.Path], steps: list[int]) -> list[dict[str, Any]]:
    """The metrics of all rounds, their steps counted through."""
    starts = itertools.accumulate(steps, initial=0)
    return [
        {**line, "step": start + line["step"]}
        for start, one in zip(starts, rounds, strict=False)
        for line in read_metrics(one)
    ]


def _forgotten(rounds: list[epath.Path]) -> list[str]:
    """What was forgotten at the end of the first round, where there is a second."""
    if len(rounds) < 2:
        return []
    scores = Scores.open(rounds[0].parent / "scores_2")
    return [forgetting_section(by_part(scores, seen_losses(rounds[0], scores.round.batches)))]


def _samples(found: Results) -> list[str]:
    how = paragraph("The prompt in bold, the continuation as the model drew it.")
    drawn = []
    for sample in found.told["samples"]:
        prompt, text = sample["prompt"], sample["text"]
        rest = html.escape(text[len(prompt) :])
        drawn.append(f"<pre><b>{html.escape(prompt)}</b>{rest}</pre>")
    return [section("Samples", how, *drawn)] if drawn else []


def _curve(metrics: list[dict[str, Any]], compressors: Mapping[str, float]) -> Figure:
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
    for (name, value), style in zip(compressors.items(), ("--", ":"), strict=True):
        held_out.axhline(value, ls=style, color="gray", label=name)
    held_out.set(title="held-out text", xlabel="step", ylabel="bits per byte")
    held_out.legend()
    for axes in (loss, held_out):
        axes.grid(alpha=0.3)
    return figure
