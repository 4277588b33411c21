"""A folder of benchmarks as OpenCompass keeps them, two rows each, made up here."""

import csv
import json

from pangu_tiny.benchmark.paper_tasks import TASKS

LETTERS = "ABCD"


def write(folder):
    """Every file that the tasks read."""
    exam = [[f"q{i}", "one", "two", "three", "four", LETTERS[i % 4]] for i in range(5)]
    ceval = [["id", "question", *LETTERS, "answer"], *([i, *row] for i, row in enumerate(exam))]
    cmmlu = [["", "Question", *LETTERS, "Answer"], *ceval[1:]]
    for name, rows in (("ceval", ceval), ("cmmlu", cmmlu), ("mmlu", exam), ("mmlu_val", exam)):
        (part,) = TASKS[name].parts
        for of_set in part.sets:
            _csv(folder / part.shots_file.format(set=of_set), rows)
            _csv(folder / part.file.format(set=of_set), rows[: len(rows) - 3])
    for part in TASKS["agieval"].parts:
        options = [f"({letter}){letter.lower()}" for letter in part.labels or LETTERS]
        for of_set in part.sets:
            rows = [
                {"passage": "p. ", "question": "q?", "options": options, "label": "B"},
                {"passage": None, "question": "q?", "options": options, "label": ["A", "B"]},
            ]
            if "answer" in part.sets[of_set]:
                rows = [row | {"options": None, "label": None, "answer": "7"} for row in rows]
            _lines(folder / part.file.format(set=of_set), rows)
    files = {
        "SuperGLUE/BoolQ/val.jsonl": [
            {"question": "is it", "passage": "It is.", "idx": 0, "label": "true"},
            {"question": "is it {not}", "passage": "It is.", "idx": 1, "label": "false"},
        ],
        "SuperGLUE/AX-b/AX-b.jsonl": [
            {"sentence1": "A.", "sentence2": "B.", "label": "entailment"},
            {"sentence1": "A.", "sentence2": "C.", "label": "not_entailment"},
        ],
        "piqa/dev.jsonl": [{"goal": "g", "sol1": "s", "sol2": "t"}] * 2,
        "FewCLUE/eprstmt/dev_few_all.json": [
            {"sentence": "好", "label": "Positive"},
            {"sentence": "坏", "label": "Negative"},
        ],
        "Xsum/dev.jsonl": [{"dialogue": "The cat sat.", "summary": "A cat sat."}] * 2,
    }
    for name, rows in files.items():
        _lines(folder / name, rows)
    (folder / "piqa" / "dev-labels.lst").write_text("1\n0\n")
    asked = [
        {"question": "谁?", "choice": ["甲", "乙", "丙"], "answer": "丙"},
        {"question": "哪?", "choice": ["东", "西", "南", "北"], "answer": "东"},
    ]
    file = folder / "CLUE" / "C3" / "dev_0.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([[["男：a", "女：b"], asked, "1-1"]]))
    return folder


def _csv(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(rows)


def _lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
