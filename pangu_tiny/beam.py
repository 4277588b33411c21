"""The jobs of a stage as an Apache Beam pipeline, for corpora beyond one machine."""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

from pangu_tiny.errors import UserError

try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise UserError("a runner needs Apache Beam: pip install 'pangu_tiny[beam]'") from error


def run_on_beam(jobs: Sequence[Any], shared: Any, runner: str, options: Sequence[str]) -> None:
    """Runs the jobs of `jobs.run_jobs` on the workers of a runner, which write their results where
    all can read them; `options` are its flags, as on a Beam command line."""
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # it logs whole stack traces
    usage = io.StringIO()  # argparse prints hundreds of lines, and then what is wrong
    try:
        with contextlib.redirect_stderr(usage):
            PipelineOptions(list(options)).get_all_options()
        with apache_beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as steps:
            _ = (
                steps
                | "jobs" >> apache_beam.Create(list(jobs))
                | "apart" >> apache_beam.Reshuffle()
                | "run" >> apache_beam.Map(_run, shared)
            )
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # every runner has its own, and argparse exits
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, SystemExit):
            reason = usage.getvalue().strip().rpartition("\n")[2]
        raise UserError(f"runner {runner!r} with {list(options)} failed: {reason}") from error


def _run(job: Any, shared: Any) -> None:
    job.run(shared)
