"""The stage `reproduce`: a whole recipe, from text to a report, in one command."""

import math
from typing import Any

from etils import epath

from pangu_tiny import config
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.evaluation.generate import generate
from pangu_tiny.reproduce.agenda import Step, run_steps
from pangu_tiny.reproduce.benchmarks import benchmark_steps, check_benchmarks
from pangu_tiny.reproduce.ladder import Ladder, check_sizes, shape_of
from pangu_tiny.reproduce.report import write_report
from pangu_tiny.reproduce.results import Recipe, Results
from pangu_tiny.reproduce.rows import Rows, prepare_text
from pangu_tiny.reproduce.rungs import PROTOCOLS, RUNGS
from pangu_tiny.reproduce.table import run_table
from pangu_tiny.reproduce.tables import check_no_rows
from pangu_tiny.reproduce.teacher import Teacher, cut_teacher, find_teacher, tokenizer_of, told_of
from pangu_tiny.reproduce.training import check_rows, check_scopes, training_of
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.text.sources import Text
from pangu_tiny.topology import processes
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.workdir import absolute


def reproduce(
    workdir: str,
    text: Text | None = None,
    dataset: str | None = None,
    teacher: str | None = None,
    rungs: list[str] | None = None,
    protocols: list[str] | None = None,
    seeds: list[int] | None = None,
    rates: list[float] | None = None,
    tuning_seed: int = 0,
    parameter_tolerance: float = 0.01,
    prompts: list[str] | None = None,
    max_epochs: float = 4.0,
    benchmarks: str | None = None,
    table: str | None = None,
    table_rows: list[str] | None = None,
) -> dict[str, Any]:
    """Makes the models of a recipe, and writes `report.html` and `report.json`.

    Cuts a tokenizer, prepares text in the big one and in the compact one, trains a teacher, ranks
    and cuts it, trains in rounds, evaluates, and draws samples. Every stage takes its own bindings
    (`prepare_data.vocab_size`, `train.steps`, …) and writes a folder of its own below `workdir`;
    run again, the stages that are done are not done twice. What is bound with a scope
    (`teacher/train.steps`, `plain/ModelShape.depth`) counts for the teacher, or for that rung.

    On several hosts it begins with `dataset`, and draws no samples.

    Args:
      workdir: the folder for everything.
      text: as prepare-data takes it; None is the library of this Python installation, so that
        nothing has to be downloaded.
      dataset: rows that are prepared already, instead of text. Rungs that inherit start from
        `train.checkpoint` then, what `inherit` has cut.
      teacher: checkpoint of a big model of one's own, instead of the one that is trained here by
        what is bound with the scope `teacher/`; its tokenizer is the big one.
      rungs: which models are made, of plain, tokenizer, architecture, inheritance, rounds: each
        adds a formula of the paper to the one before. None is `rounds`, the whole recipe.
      protocols: "equal" gives every model `train.steps` steps, in all rounds together; "paper"
        reads one corpus with each tokenizer, and adds the second round. None is "equal".
      seeds: of each rung, of initialisation and order. None is 0.
      rates: tries these peak learning rates for every rung, and takes the best; None takes those
        that are bound.
      tuning_seed: the seed with which rates are tried, none of `seeds`.
      parameter_tolerance: how much the models may differ in parameters.
      prompts: beginnings that the last model continues in the report.
      max_epochs: how often the first round may go through all rows. Chosen because up to 4 times
        the same text teaches hardly less than as much new text (arXiv 2305.16264).
      benchmarks: the folder that the stage benchmark takes; of every rung the model of the first
        seed ends with it, by what is bound for that stage.
      table: a table of the paper instead, its rows at the scale of an overlay such as
        paper/laptop.gin; see `gin/paper/README.md`.
      table_rows: of that table, by their names; None are all.
    """
    check_scopes()
    check_number("reproduce.max_epochs", max_epochs, above=0)
    check_number("reproduce.parameter_tolerance", parameter_tolerance, 0, below=1)
    if table is not None:
        asked = (dataset, teacher, rungs, protocols, rates, prompts, benchmarks)
        if any(one is not None for one in asked):
            raise UserError(
                "reproduce.table goes with table_rows, text, seeds and max_epochs alone"
            )
        seeds, tolerance = [0] if seeds is None else seeds, parameter_tolerance
        return run_table(workdir, table, table_rows, text, seeds, tolerance, max_epochs)
    if table_rows is not None:
        raise UserError("reproduce.table_rows are those of a table, expected reproduce.table")
    check_no_rows()
    rungs = ["rounds"] if rungs is None else rungs
    protocols = ["equal"] if protocols is None else protocols
    seeds = [0] if seeds is None else seeds
    _check(rungs, protocols, seeds, rates or [], tuning_seed)
    check_sizes(rungs, parameter_tolerance)
    if benchmarks is not None:
        check_benchmarks(benchmarks)
    folder, recipe = absolute(workdir), Recipe(rungs, protocols, seeds)
    evaluated: dict[str, Any] = {}
    if dataset is not None:
        _check_given(text, teacher, rungs)
        steps: list[Step] = []
        rows, start, big = Rows(None, dataset), None, None
        _check_rows(rows, rungs, max_epochs)
        length = TokenDataset.open(dataset).sequence_length
    else:
        length = settings(prepare_data, text="", workdir="")["sequence_length"]
        big = _find_teacher(folder, teacher, rungs)
        steps, rows, start = _shared(folder, text, big, rungs, length, max_epochs, evaluated)
    ladder = Ladder(folder, rows, length, start, rates or (), tuning_seed)
    steps += ladder.steps(rungs, protocols, seeds)
    claim_together(workdir, "reproduce", {})
    scores: dict[str, Any] = {}
    if benchmarks is not None:
        steps += benchmark_steps(recipe, ladder, benchmarks, scores)
    samples: list[tuple[str, str]] = []

    def draw() -> None:
        for prompt in prompts or [""]:
            checkpoint = ladder.found[recipe.last]["checkpoint"]
            samples.append((prompt, run("", generate, checkpoint=checkpoint, prompt=prompt)))

    if not processes.several():
        steps.append(Step("samples", draw))
    seconds = run_steps(steps, folder)
    told = told_of(big, length, evaluated) if big else None
    found = Results.of(recipe, ladder, rows, told, samples, scores)
    model, place = ladder.found[recipe.last], ladder.model_of(recipe.last)
    ran = [place / f"round_{number}" for number in range(1, 1 + len(model["steps"]))]
    with processes.alone() as leads:
        if leads:
            write_report(folder, found, ran, seconds)
            print(f"\n{found.text()}\n{_places(folder, ran, model['checkpoint'], seconds)}")
    return found.told


def _places(folder: epath.Path, ran: list[epath.Path], model: str, seconds: float) -> str:
    """Where all lies, and what can be done with it."""
    events = (ran[0] / "tensorboard").exists()
    logs = [f"  TensorBoard  tensorboard --logdir {folder / 'models'}"] if events else []
    return "\n".join(
        [
            f"after {seconds:.0f} s",
            f"  report       {folder / 'report.html'}",
            f"  checkpoint   {model}",
            *logs,
            "More text from it:",
            f"  pangu-tiny generate --gin.generate.checkpoint={model} --gin.generate.prompt='def '",
            "The whole ladder, five rungs with three seeds:",
            "  pangu-tiny reproduce --gin_file=recipes/laptop.gin "
            "--gin.reproduce.workdir=runs/ladder",
            "Text of your own (.txt, .jsonl, .parquet, a folder of them); gin/README.md tells how "
            "to inherit from a big model of your own:",
            "  pangu-tiny reproduce --gin_file=recipes/quickstart.gin "
            "--gin.reproduce.workdir=runs/mine --gin.reproduce.text=PATH",
        ]
    )


def _check(
    rungs: list[str],
    protocols: list[str],
    seeds: list[int],
    rates: list[float],
    tuning_seed: int,
) -> None:
    for rung in rungs:
        check_one_of("reproduce.rungs", rung, RUNGS)
    for protocol in protocols:
        check_one_of("reproduce.protocols", protocol, PROTOCOLS)
    if not rungs or rungs != [rung for rung in RUNGS if rung in rungs]:
        raise UserError(
            f"reproduce.rungs is {rungs}, expected each once, in the order {', '.join(RUNGS)}"
        )
    for seed in seeds:
        check_number("reproduce.seeds", seed, 0)
    for rate in rates:
        check_number("reproduce.rates", rate, above=0, below=math.inf)
    for name, values in (("protocols", protocols), ("seeds", seeds), ("rates", rates)):
        if len({*values}) < len(values) or not (values or name == "rates"):
            raise UserError(f"reproduce.{name} is {values}, expected different ones")
    if rates and tuning_seed in seeds:
        raise UserError(
            f"reproduce.tuning_seed is {tuning_seed}, expected none of reproduce.seeds: what rates "
            f"are chosen by is not reported"
        )


def _check_given(text: Text | None, teacher: str | None, rungs: list[str]) -> None:
    """What goes with rows that are prepared already."""
    if text is not None:
        raise UserError("reproduce.text and reproduce.dataset are bound, expected one of them")
    if teacher is not None:
        raise UserError(
            "reproduce.teacher goes with text; with reproduce.dataset, give what is cut out of it "
            "as train.checkpoint"
        )
    if "plain" in rungs:
        raise UserError("rung plain takes rows of the big tokenizer, expected no reproduce.dataset")
    if any(RUNGS[rung].inherits for rung in rungs) and not config.is_bound("train.checkpoint"):
        raise UserError(
            f"rung {rungs[-1]} inherits: with reproduce.dataset, expected train.checkpoint, the "
            f"workdir of inherit"
        )


def _find_teacher(folder: epath.Path, checkpoint: str | None, rungs: list[str]) -> Teacher | None:
    """The teacher, if a rung inherits."""
    if any(RUNGS[rung].inherits for rung in rungs):
        return find_teacher(folder, checkpoint, shape_of("rounds"))
    if checkpoint is not None:
        raise UserError("reproduce.teacher is bound, but no rung of reproduce.rungs inherits")
    return None


def _shared(
    folder: epath.Path,
    text: Text | None,
    teacher: Teacher | None,
    rungs: list[str],
    length: int,
    max_epochs: float,
    evaluated: dict[str, Any],
) -> tuple[list[Step], Rows, str | None]:
    """The stages that come before the models: of text, and of the teacher, if there is one."""
    if processes.several():
        raise UserError(
            f"reproduce.dataset is None, found {processes.count()} processes: on several hosts "
            f"text has to be prepared before, by reproduce on one host or by prepare-data"
        )
    if config.is_bound("train.checkpoint"):
        raise UserError("train.checkpoint goes with reproduce.dataset, expected none with text")
    trained = ["teacher"] if teacher and not teacher.opened else []
    readers = [scope for scope in (*trained, *rungs) if not _compact(scope)]
    vocab_sizes = {scope: shape_of(scope).vocab_size for scope in readers}
    if teacher and teacher.opened:
        vocab_sizes["the teacher"] = teacher.shape.vocab_size
    if len({*vocab_sizes.values()}) > 1:
        told = ", ".join(f"{size:,} of {scope}" for scope, size in vocab_sizes.items())
        raise UserError(f"ModelShape.vocab_size is {told}: expected one, of the big tokenizer")
    first, tokenizer = tokenizer_of(teacher, folder) if teacher else ([], None)
    steps, rows = prepare_text(
        folder,
        text,
        big_vocab=next(iter(vocab_sizes.values()), None),
        tokenizer=tokenizer,
        check=lambda rows: _check_rows(rows, [*trained, *rungs], max_epochs),
    )
    if not teacher:
        return steps, rows, None
    more, start = cut_teacher(folder, teacher, rows, length, evaluated)
    return first + steps + more, rows, start


def _compact(scope: str) -> bool:
    """Whether a rung takes the compact tokenizer; the teacher does not."""
    return scope in RUNGS and RUNGS[scope].compact


def _check_rows(rows: Rows, scopes: list[str], max_epochs: float) -> None:
    """Checks the rows for the models of rungs, and for the teacher."""
    for scope in scopes:
        dataset = rows.compact if _compact(scope) else rows.big
        check_rows(scope, training_of(scope), dataset, max_epochs)
