"""The stage `benchmark`: what a checkpoint scores on the paper's ten benchmarks.

The choice counts whose text has the lowest cross-entropy: summed over the whole text, question and
shots included, and divided by the number of all its tokens, the first included, as OpenCompass does
it; of equal ones the first. Where a text is too long for the model, shots are left out from the
last on, and what then is too long is cut on the left.
"""

import difflib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pangu_tiny.benchmark.answers import Answer, Answers, Request
from pangu_tiny.benchmark.paper_tasks import SUITES, TASKS
from pangu_tiny.benchmark.put import Put, put
from pangu_tiny.benchmark.questions import Choice
from pangu_tiny.benchmark.results import results_of, told
from pangu_tiny.benchmark.scorer import Shared, score
from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import Diverged, UserError, check_number, check_one_of
from pangu_tiny.evaluation.continuation import Asked, Drawing
from pangu_tiny.evaluation.sampling import GREEDY
from pangu_tiny.model.cached import by_layer
from pangu_tiny.program.build import DTYPES, Program, build
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import alone, say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.workdir import absolute, digest_of, write_atomically

_STRETCH = 16  # tokens of a batch that are written between two looks at them
_FORMAT = 2  # of answers: another way to come to them has another number


def benchmark(
    checkpoint: str,
    folder: str,
    workdir: str,
    hardware: Hardware,
    suite: str = "paper",
    tasks: list[str] | None = None,
    questions: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    save_seconds: float = 60.0,
) -> dict[str, Any]:
    """Scores a checkpoint on benchmarks that lie in a folder as OpenCompass keeps them.

    Args:
      checkpoint: a train workdir, or that of inherit or import-hf, or a step in one.
      folder: OpenCompass's `data` folder.
      workdir: where `benchmark.json` and `report.html` go, and answers, so that the same command
        goes on after an interruption.
      hardware: how the work is laid out.
      suite: "paper", the paper's ten.
      tasks: those of these names instead; mmlu_val is MMLU where its test split is not at hand.
      questions: of every set, the first so many; None is all. For a try: the published figures are
        of all.
      batch_size: questions that are put at once.
      dtype: "float32" or "bfloat16", of matrices and activations.
      save_seconds: between two times that answers are written.

    Returns:
      by task its score, the level of chance, and how many questions were put, how and which.
    """
    check_one_of("benchmark.suite", suite, SUITES)
    check_one_of("benchmark.dtype", dtype, DTYPES)
    check_number("benchmark.batch_size", batch_size, 1)
    check_number("benchmark.questions", questions, 1)
    chosen = list(SUITES[suite] if tasks is None else tasks)
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 3) or list(TASKS)
            raise UserError(f"benchmark.tasks: {name!r} is unknown, expected {' or '.join(near)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"benchmark.tasks is {chosen}, expected some, each of them once")
    opened = open_checkpoint(checkpoint)
    program = build(opened.shape, hardware, Marks(0, 0), dtype)
    questions_put = list(put(opened, absolute(folder), chosen, questions))
    facts = {
        "checkpoint": opened.about["identity"],
        "step": opened.about["step"],
        "questions": digest_of(
            [(one.key, one.tokens, len(one.ids)) for one in questions_put],
            *(ids for one in questions_put for ids in one.ids),
        ),
        "dtype": dtype,
        "batch_size": batch_size,
        "format": _FORMAT,
    }
    where = claim_together(workdir, "benchmark", facts)
    answers = Answers(where / "answers.json", save_seconds)
    if not all(one.key in answers.by_key for one in questions_put):
        with jax.set_mesh(program.mesh):
            dtype_stored = program.objective.decoder.dtype
            params = by_layer(opened.params(program.param_shardings, dtype_stored))
            examined = _Examined(opened, program, params, answers, batch_size)
            for name in chosen:
                of_task = [one for one in questions_put if one.key.startswith(f"{name}/")]
                examined.choose(name, of_task)
                examined.write(name, of_task)
    result = results_of(chosen, questions_put, answers.by_key) | {"step": opened.about["step"]}
    report = told(result)
    with alone() as leads:
        if leads:
            write_atomically(where / "benchmark.json", json.dumps(result, indent=1))
            report.write(where)
    say(f"benchmark {where / 'benchmark.json'}: step {opened.about['step']} of {checkpoint}")
    say(report.text())
    say(f"  report       {where / 'report.html'}")
    return result


class _Examined(NamedTuple):
    """A model, and what it has answered."""

    opened: Checkpoint
    program: Program
    params: dict[str, Any]
    answers: Answers
    batch_size: int

    def choose(self, label: str, questions: Sequence[Put]) -> None:
        """Nats of every choice."""
        asked = []
        for one in questions:
            if isinstance(one.question, Choice):
                shared = Shared.of([ids.tolist() for ids in one.ids])
                asked.append(Request(one.key, len(one.ids), shared.size, shared))
        if asked:
            self.answers.collect(label, asked, self.batch_size, self._nats)

    def _nats(self, batch: list[Request]) -> Sequence[Answer]:
        decoder, chunk = self.program.objective.decoder, self.program.hardware.loss_chunk
        found = score(decoder, self.params, [one.given for one in batch], chunk).nats_bk
        if not np.isfinite(found).all():
            raise Diverged(f"a text of {batch[0].key} has a loss that is NaN or infinite")
        return found.tolist()

    def write(self, label: str, questions: Sequence[Put]) -> None:
        """What the model writes, the likeliest token each time."""
        marks = 0 if self.opened.about["begin_id"] is None else 1
        for tokens in sorted({one.tokens for one in questions if one.tokens}):
            drawing = Drawing(self.opened, self.program, self.params, GREEDY, 0, tokens, [])
            asked = [
                Request(one.key, 1, (len(one.ids[0]),), Asked("", one.ids[0].tolist(), marks))
                for one in questions
                if one.tokens == tokens
            ]

            def answer(batch: list[Request], drawing: Drawing = drawing) -> Sequence[Answer]:
                prompts = [one.given for one in batch]
                *_, ended = drawing.draw(prompts, range(len(prompts)), _STRETCH)
                return [one.text for one in ended]

            self.answers.collect(f"{label}, written", asked, self.batch_size, answer)
