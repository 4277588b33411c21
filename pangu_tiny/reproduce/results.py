"""What a recipe found, rung by rung: as `report.json` keeps it, and in lines for a terminal."""

import dataclasses
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
      results: the same whatever it was run on, and however often it was interrupted.
      lines: by protocol, the rungs side by side.
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

    def gather(self, ladder: Ladder, rows: Rows) -> None:
        """Fills `results` and `lines` from models that are evaluated."""
        models = []
        for protocol in self.protocols:
            found: dict[str, dict[int, float]] = {}
            for rung in self.rungs:
                trials = trials_of(rung, [protocol], self.seeds)
                found[rung] = {t.seed: ladder.found[t]["bits_per_byte"] for t in trials}
                models += [trial for trial in trials if trial not in models]
            self.lines[protocol] = compare(found)
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
                protocol: [_figures(line) for line in lines]
                for protocol, lines in self.lines.items()
            },
            "tuning": {rung: tuned for rung in self.rungs if (tuned := ladder.tuned(rung))},
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
        share = 1 - self.lines[protocol][-1].mean / self.lines[protocol][0].mean
        more = "less" if share >= 0 else "more"
        return f"{abs(share):.1%} {more} than {self.rungs[0]}, {shown(*gain_of(first, last))}"

    def told(self, folder: epath.Path, ladder: Ladder, last: Trial) -> str:
        """The rungs, where all lies, and what can be done with it."""
        lines = []
        for protocol, rungs in self.lines.items():
            if len(rungs) > 1:
                lines.append(f"held-out bits per byte, protocol {protocol}")
            for line in rungs:
                holds = "" if line.holds is not False else "  does not hold"
                lines.append(f"  {line.rung:<13}{spread(line)}  {RUNGS[line.rung].adds}{holds}")
            if len(rungs) > 1:
                lines.append(f"  {self.rungs[-1]}: {self.whole_gain(protocol)}")
        others = self.results["compressors"]
        others = ", ".join(f"{name} {value:.3f}" for name, value in others.items())
        model = ladder.found[last]["checkpoint"]
        return "\n".join(
            [
                *lines,
                f"  beside them: {others}",
                f"after {self.seconds:.0f} s",
                f"  report       {folder / 'report.html'}",
                f"  checkpoint   {model}",
                f"  TensorBoard  tensorboard --logdir {folder / 'models'}",
                "More text from it:",
                f"  pangu-tiny generate --gin.generate.checkpoint={model} "
                f"--gin.generate.prompt='def '",
                "The whole ladder, five rungs with three seeds:",
                "  pangu-tiny reproduce --gin_file=recipes/laptop.gin "
                "--gin.reproduce.workdir=runs/ladder",
                "Text of your own (.txt, .jsonl, .parquet, a folder of them), a big model of your "
                "own (from import-hf):",
                "  pangu-tiny reproduce --gin_file=recipes/quickstart.gin "
                "--gin.reproduce.workdir=runs/mine "
                "--gin.reproduce.text=PATH --gin.reproduce.teacher=CHECKPOINT",
            ]
        )


def spread(line: Line) -> str:
    """A mean with half of its range."""
    return f"{line.mean:.3f}" + (f" ± {line.half_range:.3f}" if line.half_range else "")


def shown(mean: float, interval: tuple[float, float] | None) -> str:
    """A gain, with its interval."""
    return f"{mean:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def _figures(line: Line) -> dict[str, Any]:
    return {**line._asdict(), "gain": line.gain and line.gain._asdict()}


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
