"""The stage `reproduce`: a whole recipe, from text to a report, in one command."""

import os
import time
from typing import Any

from etils import epath

from pangu_tiny import config
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.errors import Stopped, UserError, check_number
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.evaluation.generate import generate
from pangu_tiny.reproduce.corpus import write_python_library
from pangu_tiny.reproduce.report import write_report
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.rounds.train_rounds import train_rounds
from pangu_tiny.text.sources import Text
from pangu_tiny.topology import processes
from pangu_tiny.training.train import train
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens
from pangu_tiny.workdir import absolute


def reproduce(
    workdir: str,
    text: Text | None = None,
    dataset: str | None = None,
    prompts: list[str] | None = None,
    max_epochs: float = 4.0,
) -> dict[str, Any]:
    """Cuts a tokenizer, prepares text, trains in rounds, evaluates, draws samples, and writes
    `report.html` and `report.json`.

    The big tokenizer is the one bound for prepare-data, or is trained there; text is prepared with
    it, counted, and prepared once more with what compress-tokenizer makes of it.

    Every stage takes its own bindings (`prepare_data.vocab_size`, `train.steps`, …) and writes a
    folder of its own below `workdir`; run again, the stages that are done are not done twice.

    On several hosts the stages of text have to be done, and no samples are drawn.

    Args:
      workdir: the folder for everything.
      text: as prepare-data takes it; None is the library of this Python installation, so that
        nothing has to be downloaded.
      dataset: rows that are prepared already, instead of text.
      prompts: beginnings that the model continues in the report.
      max_epochs: how often the first round may go through all rows. Chosen because up to 4 times
        the same text teaches hardly less than as much new text (arXiv 2305.16264).
    """
    check_number("reproduce.max_epochs", max_epochs, above=0)
    folder, started = absolute(workdir), time.monotonic()
    if dataset is not None and text is not None:
        raise UserError("reproduce.text and reproduce.dataset are bound, expected one of them")
    if dataset is None:
        if processes.several():
            raise UserError(
                f"reproduce.dataset is None, found {processes.count()} processes: on several hosts "
                f"text has to be prepared before, by reproduce on one host or by prepare-data"
            )
        dataset = _prepare_text(folder, text)
    _check_epochs(dataset, max_epochs)
    model, evaluated = (os.fspath(folder / name) for name in ("model", "evaluation"))
    trained = run("5/7 train-rounds", train_rounds, dataset=dataset, workdir=model)
    if trained.stopped or trained.step < trained.steps:
        raise Stopped(f"stopped at step {trained.step} of {trained.steps}; run again to resume")
    model = trained.checkpoint
    result = run("6/7 evaluate", evaluate, checkpoint=model, dataset=dataset, workdir=evaluated)
    samples = []
    if not processes.several():
        print("\n7/7 generate")
        for prompt in prompts or [""]:
            samples.append((prompt, run("", generate, checkpoint=model, prompt=prompt)))
    with processes.alone() as leads:
        if leads:
            report = write_report(folder, dataset, result, samples)
            _tell(folder, report, model, dataset, result, time.monotonic() - started)
    return result


def _check_epochs(dataset: str, most: float) -> None:
    """Refuses a first round that would go through the rows too often."""
    training = settings(train, dataset=dataset, workdir="")
    taken = training["steps"] * training["global_batch"]
    rows = TokenDataset.described(dataset).count("train")
    if taken > most * rows:
        raise UserError(
            f"train.steps × train.global_batch is {taken:,} rows, {taken / rows:.1f} times the "
            f"{rows:,} of dataset {dataset}, expected at most reproduce.max_epochs, {most:g}: take "
            f"more text, or fewer steps"
        )


def _prepare_text(folder: epath.Path, text: Text | None) -> str:
    """The stages of text; returns the dataset that they make."""
    folder.mkdir(parents=True, exist_ok=True)
    if text is None:
        write_python_library(folder / "corpus.jsonl")
        text = os.fspath(folder / "corpus.jsonl")
    big, counts, compact, data = (
        os.fspath(folder / name) for name in ("big_data", "counts", "tokenizer", "data")
    )
    given, _ = config.arguments(prepare_data, text=text, workdir=big)
    reading = {name: value for name, value in given.items() if name == "text_key"}
    run("1/7 prepare-data, with the big tokenizer", prepare_data, text=text, workdir=big)
    run(
        "2/7 count-tokens",
        count_tokens,
        workdir=counts,
        dataset=big,
        text=None,
        tokenizer=None,
    )
    run(
        "3/7 compress-tokenizer",
        compress_tokenizer,
        workdir=compact,
        counts=counts,
        tokenizer=f"{big}/tokenizer.model",
        text=text,
        **reading,
    )
    run(
        "4/7 prepare-data, with the compact tokenizer",
        prepare_data,
        text=text,
        workdir=data,
        tokenizer=f"{compact}/tokenizer.model",
        vocab_size=None,
    )
    return data


def _tell(
    folder: epath.Path,
    report: epath.Path,
    model: str,
    dataset: str,
    result: dict[str, Any],
    seconds: float,
) -> None:
    tokenizer = folder / "tokenizer" / "report.html"
    cut = f"\n  tokenizer    {tokenizer}" if tokenizer.exists() else ""
    print(
        f"\n{result['bits_per_byte']:.3f} bits per byte on held-out documents; gzip -9 takes "
        f"{result['gzip_9_bits_per_byte']:.3f}, xz -9 {result['xz_9_bits_per_byte']:.3f}"
        f"\nafter {seconds:.0f} s"
        f"\n  report       {report}"
        f"\n  checkpoint   {model}"
        f"\n  data         {dataset}"
        f"{cut}"
        f"\n  TensorBoard  tensorboard --logdir {folder / 'model'}"
        f"\nMore text from it:"
        f"\n  pangu-tiny generate --gin.generate.checkpoint={model} --gin.generate.prompt='def '"
        f"\nThe same on text of your own (.txt, .jsonl, .parquet, a folder of them):"
        f"\n  pangu-tiny reproduce --gin_file=recipes/laptop.gin --gin.reproduce.text=PATH "
        f"--gin.reproduce.workdir=runs/mine"
    )
