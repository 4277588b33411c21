"""Answers to scores, and the table that tells them beside the paper's."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pangu_tiny.benchmark.answers import Answer
from pangu_tiny.benchmark.paper_tasks import PAPER, SUITES, TASKS
from pangu_tiny.benchmark.put import Put
from pangu_tiny.benchmark.questions import NONE, Choice
from pangu_tiny.page import Report, paragraph, section, table


def results_of(
    names: Sequence[str],
    put: Sequence[Put],
    answers: Mapping[str, Answer],
    lm_eval: dict[str, Any],
) -> dict[str, Any]:
    """Of every task the mean over its sets, in hundredths; of a set the mean over its questions.
    Beside them what lm-eval told; `average` is that of all tasks whose metric is a share."""
    by_task: dict[str, dict[str, list[Put]]] = {name: {} for name in names}
    for one in put:
        name, of_set, _ = one.key.split("/")
        by_task[name].setdefault(of_set, []).append(one)
    tasks: dict[str, Any] = {}
    for name, sets in by_task.items():
        scores = {
            of_set: 100 * statistics.fmean(right(one, answers[one.key]) for one in questions)
            for of_set, questions in sets.items()
        }
        task, questions = TASKS[name], [one for of_set in sets.values() for one in of_set]
        levels = [
            statistics.fmean(_chance(one) for one in of_set)
            for of_set in sets.values()
            if isinstance(of_set[0].question, Choice)
        ]
        tasks[name] = {
            "title": task.title,
            "metric": task.metric,
            "score": statistics.fmean(scores.values()),
            # Of what is written there is no level.
            "chance": 100 * statistics.fmean(levels) if levels else None,
            "split": task.split,
            "questions": len(questions),
            "published": task.published,
            "shots_left_out": sum(one.shots_left_out for one in questions),
            "cut_on_the_left": sum(one.cut for one in questions),
            "source": task.source,
            "sets": {
                of_set: {"score": scores[of_set], "questions": len(sets[of_set])}
                for of_set in (sets if len(sets) > 1 else ())
            },
        }
    every = [one["score"] for one in (*tasks.values(), *lm_eval.values())]
    shares = [score for score in every if score is not None]
    average = statistics.fmean(shares) if shares else None
    return {"tasks": tasks, "lm_eval": lm_eval, "average": average}


def right(one: Put, answer: Answer) -> float:
    """How right an answer is, from 0 to 1."""
    if isinstance(one.question, Choice):
        entropies = np.asarray(answer) / [len(ids) for ids in one.ids]
        return float(one.question.gold != NONE and np.argmin(entropies) == one.question.gold)
    assert one.part.grade and isinstance(answer, str)
    return one.part.grade(answer, one.question.reference)


def _chance(one: Put) -> float:
    """Of who takes any of the choices that differ."""
    assert isinstance(one.question, Choice)
    return 1 / len(set(one.question.bodies)) if one.question.gold != NONE else 0.0


_PAPER = "The paper's rows are those of its table of results; its prompts are not stated in it."


def told(result: dict[str, Any]) -> Report:
    """The lines and the page of a result."""
    tasks = result["tasks"]
    facts = {}
    for task in tasks.values():
        line = f"{task['score']:.2f}"
        if task["chance"] is not None:
            line += f", chance {task['chance']:.2f}"
        facts[task["title"]] = f"{line} ({task['metric']}, {_counted(task)})"
    for name, task in result["lm_eval"].items():
        facts[name] = _metrics(task)
    if result["average"] is not None:
        facts["average"] = f"{result['average']:.2f}"
    sections = []
    if tasks:
        sections = [
            beside_paper({"this one": tasks}),
            section(
                "Questions",
                table(
                    [
                        (task["title"], task["split"], _counted(task), task["source"])
                        for task in tasks.values()
                    ],
                    (
                        "benchmark",
                        "split",
                        "questions",
                        "prompts, in OpenCompass's configs/datasets",
                    ),
                ),
            ),
        ]
    if result["lm_eval"]:
        sections.append(by_lm_eval(result["lm_eval"]))
    for task in tasks.values():
        if task["sets"]:
            lines = [
                (name, f"{found['score']:.2f}", found["questions"])
                for name, found in task["sets"].items()
            ]
            sections.append(section(task["title"], table(lines, ("set", "score", "questions"))))
    return Report("Benchmarks", facts, (), sections)


def beside_paper(models: Mapping[str, dict[str, Any]]) -> str:
    """A section: the scores of models by name, of chance and of the paper's models, with the means
    of these columns.

    Args:
      models: the tasks of `results_of`, the same of each.
    """
    tasks = next(iter(models.values()))
    head = ("model", *(task["title"] for task in tasks.values()), "average")

    def row(model: str, scores: Sequence[float]) -> list[str]:
        return [model, *(f"{score:.2f}" for score in (*scores, statistics.fmean(scores)))]

    rows = [row(model, [one["score"] for one in of.values()]) for model, of in models.items()]
    chance = [task["chance"] for task in tasks.values()]
    rows.append(["chance", *("" if level is None else f"{level:.2f}" for level in chance), ""])
    columns = [name.removesuffix("_val") for name in tasks]
    if set(columns) <= set(SUITES["paper"]):
        places = [SUITES["paper"].index(name) for name in columns]
        rows += [row(model, [of[place] for place in places]) for model, of in PAPER.items()]
    return section("Benchmarks, beside the paper's", table(rows, head), paragraph(_PAPER))


_TOLD = ("shots", "questions", "version")


def by_lm_eval(tasks: Mapping[str, dict[str, Any]]) -> str:
    """A section: what lm-eval told of tasks by name."""
    rows = [
        (name, _metrics(task), *("" if task[of] is None else task[of] for of in _TOLD))
        for name, task in tasks.items()
    ]
    head = ("task", "metrics ± standard error", *_TOLD)
    return section("By lm-evaluation-harness", table(rows, head))


def _metrics(task: dict[str, Any]) -> str:
    """As lm-eval names them, `METRIC,FILTER`; each with its standard error where it has one."""
    found = []
    for name, value in task["metrics"].items():
        metric, kept = name.split(",", 1)
        if metric.endswith("_stderr"):
            continue
        told = f"{metric} {value:.4f}" if kept == "none" else f"{metric} ({kept}) {value:.4f}"
        error = task["metrics"].get(f"{metric}_stderr,{kept}")
        found.append(told if error is None else f"{told} ± {error:.4f}")
    return ", ".join(found)


def _counted(task: dict[str, Any]) -> str:
    count = f"{task['questions']:,}"
    if task["published"] not in (None, task["questions"]):
        count += f" of {task['published']:,}"
    count += " questions"
    if task["shots_left_out"]:
        count += f", {task['shots_left_out']:,} with fewer shots"
    if task["cut_on_the_left"]:
        count += f", {task['cut_on_the_left']:,} cut on the left"
    return count
