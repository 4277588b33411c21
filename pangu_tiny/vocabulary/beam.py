"""The counting of count-tokens as an Apache Beam pipeline, for corpora beyond one machine."""

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary.counts import SourceCounts, save

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise UserError(
        "count_tokens.runner needs Apache Beam: pip install 'pangu_tiny[beam]'"
    ) from error


def count_by_source(
    jobs: Sequence[Any],
    files: dict[str, epath.Path],
    tokenizer: Tokenizer,
    runner: str,
    options: Sequence[str],
) -> None:
    """Counts all jobs and leaves the sum of each source in a file.

    Args:
      jobs: have a `source` and `count(tokenizer)`.
      files: the file of each source, where the workers can write.
      tokenizer: what is counted.
      runner: the name of a Beam runner.
      options: its flags, as on a Beam command line.

    Raises:
      UserError: there is no such runner, or the pipeline failed.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # it logs whole stack traces
    usage = io.StringIO()  # argparse prints hundreds of lines, and then what is wrong
    try:
        with contextlib.redirect_stderr(usage):
            PipelineOptions(list(options)).get_all_options()
        with beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as pipeline:
            _ = (
                pipeline
                | "jobs" >> beam.Create(list(jobs))
                | "apart" >> beam.Reshuffle()
                | "count" >> beam.ParDo(_Count(tokenizer.model_bytes))
                | "add up" >> beam.CombinePerKey(_Add())
                | "write" >> beam.Map(lambda found: save(files[found[0]], found[1]))
            )
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # every runner has its own, and argparse exits
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, SystemExit):
            reason = usage.getvalue().strip().rpartition("\n")[2]
        raise UserError(
            f"count_tokens.runner {runner!r} with {list(options)} failed: {reason}"
        ) from error


class _Count(beam.DoFn):
    """A job to its source and counts; a worker opens the tokenizer once."""

    def __init__(self, model_bytes: bytes):
        self._model_bytes = model_bytes

    def setup(self) -> None:
        self._tokenizer = Tokenizer(self._model_bytes)

    def process(self, job: Any) -> Iterable[tuple[str, SourceCounts]]:
        yield job.source, job.count(self._tokenizer)


class _Add(beam.CombineFn):
    """Adds counts up."""

    def create_accumulator(self) -> SourceCounts | None:
        return None

    def add_input(self, total: SourceCounts | None, counts: SourceCounts) -> SourceCounts:
        return counts if total is None else total + counts

    def merge_accumulators(self, totals: Iterable[SourceCounts | None]) -> SourceCounts | None:
        total = None
        for found in totals:
            if found is not None:
                total = self.add_input(total, found)
        return total

    def extract_output(self, total: SourceCounts | None) -> SourceCounts | None:
        return total
