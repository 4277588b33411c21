"""What a recipe found, rung by rung: as `report.json` keeps it, and in lines for a terminal."""

import dataclasses
import math
from typing import Any

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.comparison import Line, compare, gain_of
from pangu_tiny.reproduce.ladder import Ladder, Trial, shape_of, trials_of
from pangu_tiny.reproduce.rows import Rows, bytes_a_token
from pangu_tiny.reproduce.rungs import RUNGS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which models are made."""

    rungs: list[str]
    protocols: list[str]
    seeds: list[int]

    @property
    def trials(self) -> list[Trial]:
        return [t for rung in self.rungs for t in trials_of(rung, self.protocols, self.seeds)]

    @property
    def shown(self) -> list[Trial]:
        """Of every rung, the model that is shown."""
        return [trials_of(rung, self.protocols, self.seeds)[0] for rung in self.rungs]

    @property
    def last(self) -> Trial:
        """That of the last rung."""
        return self.shown[-1]


@dataclasses.dataclass(frozen=True)
class Results:
    """What was found of its models.

    Attributes:
      told: for `report.json`; the same on one machine, however often it was interrupted.
      lines: by protocol, the rungs side by side.
      by_source: the same by protocol and source of text.
    """

    recipe: Recipe
    told: dict[str, Any]
    lines: dict[str, list[Line]]
    by_source: dict[str, dict[str, list[Line]]]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        ladder: Ladder,
        rows: Rows,
        teacher: dict[str, Any] | None,
        samples: list[tuple[str, str]],
        benchmarks: dict[str, Any],
    ) -> "Results":
        """From models that are evaluated.

        Args:
          teacher: what is told of it.
          samples: prompts, each with the text that begins with it.
          benchmarks: by rung, what the model that is shown scored.
        """

        def compared(protocol: str, source: str | None = None) -> list[Line]:
            found = {}
            for rung in recipe.rungs:
                of = {t.seed: ladder.found[t] for t in trials_of(rung, [protocol], recipe.seeds)}
                found[rung] = {
                    seed: one["sources"][source] if source else one["bits_per_byte"]
                    for seed, one in of.items()
                }
            lines = compare(found)
            return lines if protocol == "equal" else [line._replace(holds=None) for line in lines]

        sources = list(ladder.found[recipe.last]["sources"])
        lines = {protocol: compared(protocol) for protocol in recipe.protocols}
        by_source = {
            protocol: {source: compared(protocol, source) for source in sources}
            for protocol in recipe.protocols
        }
        paths = zip(("big", "compact"), rows, strict=True)
        told = {
            "rungs": {rung: _model(shape_of(rung)) for rung in recipe.rungs},
            "text": {name: _text(path) for name, path in paths if path is not None},
            "compressors": _compressors(rows.compact),
            "models": [_trial(trial, ladder.found[trial]) for trial in recipe.trials],
            "ladder": {
                protocol: {
                    "rungs": [_figures(line) for line in lines[protocol]],
                    "sources": {
                        source: [_figures(line) for line in of]
                        for source, of in by_source[protocol].items()
                    },
                }
                for protocol in recipe.protocols
            },
            "tuning": {
                scope: {f"{rate:g}": _finite(value) for rate, value in tuned.items()}
                for scope in dict.fromkeys(trial.scope for trial in recipe.trials)
                if (tuned := ladder.tuned(scope))
            },
            "teacher": teacher,
            "benchmarks": benchmarks,
            "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
        }
        return cls(recipe, told, lines, by_source)

    def of_rung(self, rung: str, protocol: str) -> list[dict[str, Any]]:
        """What was found of its models, by seed."""
        found = dict(zip(self.recipe.trials, self.told["models"], strict=True))
        return [found[trial] for trial in trials_of(rung, [protocol], self.recipe.seeds)]

    def whole_gain(self, protocol: str) -> str:
        """What the last rung has over the first."""
        ends = self.lines[protocol][0], self.lines[protocol][-1]
        first, last = (
            {model["seed"]: model["bits_per_byte"] for model in self.of_rung(end.rung, protocol)}
            for end in ends
        )
        share = 1 - ends[1].spread.mean / ends[0].spread.mean
        more = "less" if share >= 0 else "more"
        gain = gain_of(first, last)
        return f"{ends[1].rung}: {abs(share):.1%} {more} than {ends[0].rung}, {gain}"

    def text(self) -> str:
        """The rungs side by side."""
        lines = []
        for protocol, rungs in self.lines.items():
            lines.append(f"held-out bits per byte, protocol {protocol}")
            for line in rungs:
                holds = "" if line.holds is not False else "  does not hold"
                lines.append(f"  {line.rung:<13}{line.spread}  {RUNGS[line.rung].adds}{holds}")
            if len(rungs) > 1:
                lines.append(f"  {self.whole_gain(protocol)}")
        others = (f"{name} {value:.3f}" for name, value in self.told["compressors"].items())
        return "\n".join([*lines, f"  beside them: {', '.join(others)}"])


def _model(shape: ModelShape) -> dict[str, Any]:
    return {"parameters": shape.parameters, "model": dataclasses.asdict(shape)}


def _trial(trial: Trial, found: dict[str, Any]) -> dict[str, Any]:
    """What is told of it; where its checkpoint lies is not."""
    told = {name: value for name, value in found.items() if name != "checkpoint"}
    return {"rung": trial.rung, "protocol": trial.protocol, "seed": trial.seed, **told}


def _figures(line: Line) -> dict[str, Any]:
    gain = line.gain and line.gain._asdict()
    return {"rung": line.rung, **line.spread._asdict(), "gain": gain, "holds": line.holds}


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if value < math.inf else None


def _text(dataset: str) -> dict[str, Any]:
    data = TokenDataset.described(dataset)
    split = data.description["splits"]["train"]
    return {
        "pieces": data.vocab_size,
        "tokenizer": data.tokenizer_digest,
        "dataset": data.digest,
        "documents": split["documents"],
        "bytes": split["bytes"],
        "tokens": split["tokens"],
        "bytes_a_token": bytes_a_token(dataset),
    }


def _compressors(dataset: str) -> dict[str, float]:
    """Bits per byte of held-out documents, each compressed on its own."""
    held_out = TokenDataset.described(dataset).description["splits"]["held_out"]
    return {
        "gzip -9": 8 * held_out["gzip_bytes"] / held_out["bytes"],
        "xz -9": 8 * held_out["xz_bytes"] / held_out["bytes"],
    }
