"""What a recipe found, rung by rung: as `report.json` keeps it, and in lines for a terminal."""

import dataclasses
import math
from typing import Any

from etils import epath

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.comparison import Line, compare, gain_of
from pangu_tiny.reproduce.ladder import Ladder, Trial, shape_of, trials_of
from pangu_tiny.reproduce.rows import Rows, bytes_a_token
from pangu_tiny.reproduce.rungs import RUNGS


@dataclasses.dataclass
class Results:
    """Filled while a recipe runs.

    Attributes:
      teacher, teacher_tokens: its shape, and what it is trained on here, if it is.
      evaluated: what evaluate found of "teacher", and of "cut", before any training.
      samples: prompts, each with the text that begins with it.
      seconds: that all took.
      results: the same on one machine, however often it was interrupted.
      lines: by protocol, the rungs side by side.
      by_source: the same by protocol and source of text.
    """

    rungs: list[str]
    protocols: list[str]
    seeds: list[int]
    teacher: ModelShape | None = None
    teacher_tokens: int | None = None
    evaluated: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: dict[str, list[Line]] = dataclasses.field(default_factory=dict)
    by_source: dict[str, dict[str, list[Line]]] = dataclasses.field(default_factory=dict)

    def gather(self, ladder: Ladder, rows: Rows) -> None:
        """Fills `results` and `lines` from models that are evaluated."""
        models = [t for rung in self.rungs for t in trials_of(rung, self.protocols, self.seeds)]
        sources = list(ladder.found[models[0]]["sources"])

        def compared(protocol: str, source: str | None = None) -> list[Line]:
            found = {}
            for rung in self.rungs:
                of = {t.seed: ladder.found[t] for t in trials_of(rung, [protocol], self.seeds)}
                found[rung] = {
                    seed: one["sources"][source] if source else one["bits_per_byte"]
                    for seed, one in of.items()
                }
            lines = compare(found)
            return lines if protocol == "equal" else [line._replace(holds=None) for line in lines]

        self.lines = {protocol: compared(protocol) for protocol in self.protocols}
        self.by_source = {
            protocol: {source: compared(protocol, source) for source in sources}
            for protocol in self.protocols
        }
        shapes = {rung: shape_of(rung) for rung in self.rungs}
        self.results = {
            "rungs": {
                rung: {"parameters": shape.parameters, "model": dataclasses.asdict(shape)}
                for rung, shape in shapes.items()
            },
            "text": {
                name: _text(path)
                for name, path in zip(("big", "compact"), rows, strict=True)
                if path is not None
            },
            "compressors": _compressors(rows.compact),
            "models": [self._model(ladder, trial) for trial in models],
            "ladder": {
                protocol: {
                    "rungs": [_figures(line) for line in lines],
                    "sources": {
                        source: [_figures(line) for line in of]
                        for source, of in self.by_source[protocol].items()
                    },
                }
                for protocol, lines in self.lines.items()
            },
            "tuning": {
                scope: {f"{rate:g}": _finite(value) for rate, value in tuned.items()}
                for scope in dict.fromkeys(trial.scope for trial in models)
                if (tuned := ladder.tuned(scope))
            },
            "samples": [{"prompt": prompt, "text": text} for prompt, text in self.samples],
        }
        if self.teacher:
            self.results["teacher"] = {
                "parameters": self.teacher.parameters,
                "tokens": self.teacher_tokens,
                "bits_per_byte": self.evaluated["teacher"]["bits_per_byte"],
                "bits_per_byte_after_the_cut": self.evaluated["cut"]["bits_per_byte"],
            }

    def _model(self, ladder: Ladder, trial: Trial) -> dict[str, Any]:
        told = {k: v for k, v in ladder.found[trial].items() if k != "checkpoint"}
        return {"rung": trial.rung, "protocol": trial.protocol, "seed": trial.seed, **told}

    def of_rung(self, rung: str, protocol: str) -> list[dict[str, Any]]:
        """What was found of its models, by seed."""
        trials = trials_of(rung, [protocol], self.seeds)
        found = {
            (model["rung"], model["protocol"], model["seed"]): model
            for model in self.results["models"]
        }
        return [found[trial.rung, trial.protocol, trial.seed] for trial in trials]

    def whole_gain(self, protocol: str) -> str:
        """What the last rung has over the first."""
        first, last = (
            {m["seed"]: m["bits_per_byte"] for m in self.of_rung(rung, protocol)}
            for rung in (self.rungs[0], self.rungs[-1])
        )
        share = 1 - self.lines[protocol][-1].spread.mean / self.lines[protocol][0].spread.mean
        more = "less" if share >= 0 else "more"
        return f"{abs(share):.1%} {more} than {self.rungs[0]}, {gain_of(first, last)}"

    def told(self, folder: epath.Path, ladder: Ladder, last: Trial) -> str:
        """The rungs, where all lies, and what can be done with it."""
        lines = []
        for protocol, rungs in self.lines.items():
            lines.append(f"held-out bits per byte, protocol {protocol}")
            for line in rungs:
                holds = "" if line.holds is not False else "  does not hold"
                lines.append(f"  {line.rung:<13}{line.spread}  {RUNGS[line.rung].adds}{holds}")
            if len(rungs) > 1:
                lines.append(f"  {self.rungs[-1]}: {self.whole_gain(protocol)}")
        others = self.results["compressors"]
        others = ", ".join(f"{name} {value:.3f}" for name, value in others.items())
        model = ladder.found[last]["checkpoint"]
        logs = any(ladder.model_of(last).glob("round_1/tensorboard"))
        events = [f"  TensorBoard  tensorboard --logdir {folder / 'models'}"] if logs else []
        return "\n".join(
            [
                *lines,
                f"  beside them: {others}",
                f"after {self.seconds:.0f} s",
                f"  report       {folder / 'report.html'}",
                f"  checkpoint   {model}",
                *events,
                "More text from it:",
                f"  pangu-tiny generate --gin.generate.checkpoint={model} "
                f"--gin.generate.prompt='def '",
                "The whole ladder, five rungs with three seeds:",
                "  pangu-tiny reproduce --gin_file=recipes/laptop.gin "
                "--gin.reproduce.workdir=runs/ladder",
                "Text of your own (.txt, .jsonl, .parquet, a folder of them); gin/README.md tells "
                "how to inherit from a big model of your own:",
                "  pangu-tiny reproduce --gin_file=recipes/quickstart.gin "
                "--gin.reproduce.workdir=runs/mine --gin.reproduce.text=PATH",
            ]
        )


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
