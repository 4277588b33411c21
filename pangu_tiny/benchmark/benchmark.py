"""The stage `benchmark`: what a checkpoint scores on the paper's ten, and on tasks of others.

The choice counts whose text has the lowest cross-entropy: summed over the whole text, question and
shots included, and divided by the number of all its tokens, the first included, as OpenCompass does
it; of equal ones the first. Where a text is too long for the model, shots are left out from the
last on, and what then is too long is cut on the left. Tasks of lm-evaluation-harness are asked and
scored by its own rules.
"""

import difflib
import json
from typing import Any

import jax

from pangu_tiny.benchmark.answers import Answers
from pangu_tiny.benchmark.examined import Examined
from pangu_tiny.benchmark.harness_tasks import HarnessTasks
from pangu_tiny.benchmark.paper_tasks import SUITES, TASKS
from pangu_tiny.benchmark.put import put
from pangu_tiny.benchmark.questions import LM_EVAL
from pangu_tiny.benchmark.results import results_of, told
from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.program.build import DTYPES, build
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import alone, say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.workdir import absolute, digest_of, write_atomically

_FORMAT = 2  # of answers: another way to come to them has another number


def chosen_of(
    folder: str,
    suite: str,
    tasks: list[str] | None,
    questions: int | None,
    task_files: str | None,
    shots: int | None,
) -> tuple[list[str], HarnessTasks | None]:
    """What is asked: tasks of this project by name, and those of lm-eval, if there are any."""
    check_one_of("benchmark.suite", suite, SUITES)
    check_number("benchmark.questions", questions, 1)
    check_number("benchmark.shots", shots, 0)
    chosen = list(SUITES[suite] if tasks is None else tasks)
    ours = [name for name in chosen if not name.startswith(LM_EVAL)]
    for name in ours:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 3) or [*TASKS, f"{LM_EVAL}NAME"]
            raise UserError(f"benchmark.tasks: {name!r} is unknown, expected {' or '.join(near)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"benchmark.tasks is {chosen}, expected some, each of them once")
    if len(ours) == len(chosen):
        for name, value in (("task_files", task_files), ("shots", shots)):
            if value is not None:
                raise UserError(f"benchmark.{name} is for tasks of lm-eval, of which none is asked")
        return ours, None
    theirs = [name for name in chosen if name not in ours]
    return ours, HarnessTasks(theirs, folder, task_files, shots, questions)


def check_sizes(batch_size: int, dtype: str) -> None:
    """Refuses how nothing is computed."""
    check_number("benchmark.batch_size", batch_size, 1)
    check_one_of("benchmark.dtype", dtype, DTYPES)


def benchmark(
    checkpoint: str,
    folder: str,
    workdir: str,
    hardware: Hardware,
    suite: str = "paper",
    tasks: list[str] | None = None,
    questions: int | None = None,
    task_files: str | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    save_seconds: float = 60.0,
) -> dict[str, Any]:
    """Scores a checkpoint on benchmarks that lie in a folder as OpenCompass keeps them.

    Args:
      checkpoint: a train workdir, or that of inherit or import-hf, or a step in one.
      folder: OpenCompass's `data` folder; below it, too, what tasks of lm-eval read.
      workdir: where `benchmark.json` and `report.html` go, and answers, so that the same command
        goes on after an interruption.
      hardware: how the work is laid out.
      suite: "paper", the paper's ten; "ablation", the three by which it compares its ablations.
      tasks: those of these names instead; mmlu_val is MMLU where its test split is not at hand, and
        `lm-eval:NAME` one of lm-evaluation-harness (the extra `benchmark`).
      questions: of every set, the first so many; None is all. For a try: the published figures are
        of all.
      task_files: a folder with task files of your own, in lm-evaluation-harness's form.
      shots: of all tasks of lm-eval but those that say 0; None is what they say, or none.
      batch_size: rows of questions that are put at once, each of several short ones or a long one;
        at least one for each device that cuts a batch.
      dtype: "float32" or "bfloat16", of matrices and activations.
      save_seconds: between two times that answers are written.

    Returns:
      by task its score, the level of chance, and how many questions were put, how and which.
    """
    check_sizes(batch_size, dtype)
    ours, theirs = chosen_of(folder, suite, tasks, questions, task_files, shots)
    opened = open_checkpoint(checkpoint)
    program = build(opened.shape, hardware, Marks(0, 0), dtype)
    if theirs:
        theirs.check(opened.about["sequence_length"])
    questions_put = list(put(opened, absolute(folder), ours, questions))
    facts = {
        "checkpoint": opened.about["identity"],
        "step": opened.about["step"],
        "questions": digest_of(
            [(one.key, one.tokens, len(one.ids)) for one in questions_put],
            *(ids for one in questions_put for ids in one.ids),
        ),
        "lm_eval": theirs and {"tasks": theirs.facts, "questions": questions},
        "dtype": dtype,
        "batch_size": batch_size,
        "format": _FORMAT,
    }
    where = claim_together(workdir, "benchmark", facts)
    answers = Answers(where / "answers.json", save_seconds)
    with jax.set_mesh(program.mesh):
        examined = Examined(opened, program, answers, batch_size)
        for name in ours:
            of_task = [one for one in questions_put if one.key.startswith(f"{name}/")]
            examined.choose(name, of_task)
            examined.write(name, of_task)
        found = theirs.scores(examined) if theirs else {}
    result = results_of(ours, questions_put, answers.by_key, found) | {"step": opened.about["step"]}
    report = told(result)
    with alone() as leads:
        if leads:
            write_atomically(where / "benchmark.json", json.dumps(result, indent=1))
            report.write(where)
    say(f"benchmark {where / 'benchmark.json'}: step {opened.about['step']} of {checkpoint}")
    say(report.text())
    say(f"  report       {where / 'report.html'}")
    return result
