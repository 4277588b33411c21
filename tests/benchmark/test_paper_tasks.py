"""Every declaration on two rows that were made up: the very texts, and what is wrong in a line."""

import opencompass_files
import pytest
from etils import epath

from pangu_tiny.benchmark.paper_tasks import PAPER, SUITES, TASKS
from pangu_tiny.benchmark.questions import NONE
from pangu_tiny.errors import UserError

OPTIONS = "A. one\nB. two\nC. three\nD. four\n"
CEVAL = "以下是中国关于会计考试的单项选择题，请选出其中的正确答案。\n".replace("会计", "注册会计师")
CMMLU = "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n"
TEXTS = {
    ("ceval", "accountant"): "".join(
        f"{CEVAL}q{i}\n{OPTIONS}答案: \n{'ABCDA'[i]}\n\n\n" for i in range(5)
    )
    + f"\n\n{CEVAL}q0\n{OPTIONS}答案: \nA",
    ("cmmlu", "agronomy"): "".join(
        f"{CMMLU}题目：q{i}\n{OPTIONS}答案是: {'ABCDA'[i]}\n\n\n" for i in range(5)
    )
    + f"\n\n{CMMLU}题目：q0\n{OPTIONS}答案是: A",
    ("mmlu", "college_biology"): (
        "The following are multiple choice questions (with answers) about  college biology.\n\n"
        + "".join(f"q{i}\n{OPTIONS}Answer: {'ABCDA'[i]}\n\n" for i in range(5))
        + f"q0\n{OPTIONS}Answer: A"
    ),
    ("agieval", "gaokao-history"): "以下是一道中国高考历史选择题，请选择正确的答案。\n"
    "p. q?\n(A)a\n(B)b\n(C)c\n(D)d\n答案是：B",
    ("agieval", "lsat-ar"): "The following is a LSAT Analytical Reasoning question. Please select"
    " the correct answer.\np. q?\n(A)a\n(B)b\n(C)c\n(D)d\n(E)e\nThe answer is B",
    ("agieval", "jec-qa-ca"): "以下是一道中国司法考试案例分析题，请选择正确的答案。\n"
    "p. q?\n(A)a\n(B)b\n(C)c\n(D)d\nThe answer is ",
    ("agieval", "math"): "The following is a Math question. Please select the correct answer.\n"
    "p. q?The answer is ",
    ("boolq", ""): "It is.\nQuestion: is it?\nYes",
    ("ax_b", ""): "A.\nB.\nIs the sentence below entailed by the sentence above?\nYes",
    ("piqa", ""): "The following makes sense: \nQ: g\nA: t\n",
    ("eprstmt", ""): ' 内容： "好"。情绪分类：积极。',
    ("xsum", ""): "Document：The cat sat.\nBased on the previous text, provide a brief single"
    " summary:",
    ("c3", ""): "文章：男：a 女：b\n问题：谁?\n答案：丙",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return epath.Path(opencompass_files.write(tmp_path_factory.mktemp("benchmarks")))


def asked(folder, task, of_set):
    (part,) = (part for part in TASKS[task].parts if of_set in part.sets)
    return part.questions(folder, of_set)


@pytest.mark.parametrize(("task", "of_set"), TEXTS, ids="/".join)
def test_the_text_of_the_right_answer(folder, task, of_set):
    """White space is part of it; a label that is read off by one gives another text."""
    question, *_ = asked(folder, task, of_set)
    if hasattr(question, "gold"):
        assert question.texts(len(question.shots))[question.gold] == TEXTS[task, of_set]
    else:
        assert question.prompt == TEXTS[task, of_set]


def test_without_shots(folder):
    """OpenCompass puts white space before the question all the same."""
    ceval, *_ = asked(folder, "ceval", "accountant")
    assert ceval.texts(0)[0] == f"\n\n{CEVAL}q0\n{OPTIONS}答案: \nA"
    mmlu, *_ = asked(folder, "mmlu", "college_biology")
    assert mmlu.texts(0)[0].startswith(f"{mmlu.head}\nq0\n") and mmlu.head.endswith("\n\n")


def test_every_set_of_every_task_has_its_two_questions(folder):
    counts = {
        name: sum(len(part.questions(folder, s)) for part in task.parts for s in part.sets)
        for name, task in TASKS.items()
    }
    sets = {name: sum(len(part.sets) for part in task.parts) for name, task in TASKS.items()}
    assert counts == {name: 2 * number for name, number in sets.items()}
    assert [sets[name] for name in ("ceval", "cmmlu", "mmlu", "agieval")] == [52, 67, 57, 21]


def test_labels_that_are_several_are_no_choice_and_text_is_kept(folder):
    assert asked(folder, "agieval", "gaokao-physics")[1].gold == NONE
    assert asked(folder, "agieval", "jec-qa-kd")[1].reference == "AB"
    assert asked(folder, "boolq", "")[1].texts(0)[0].endswith("is it {not}?\nNo")
    three, four = asked(folder, "c3", "")
    assert three.texts(0)[3] == three.texts(0)[0] and len(set(four.texts(0))) == 4


@pytest.mark.parametrize(
    ("task", "file", "content", "said"),
    [
        ("boolq", "SuperGLUE/BoolQ/val.jsonl", None, "val.jsonl is missing, SuperGLUE/BoolQ/val"),
        ("boolq", "SuperGLUE/BoolQ/val.jsonl", '\n{"label": "true"}', "line 2 has no 'passage'"),
        (
            "ax_b",
            "SuperGLUE/AX-b/AX-b.jsonl",
            '{"sentence1": "", "sentence2": "", "label": "maybe"}',
            "line 1: label is 'maybe', expected one of entailment, not_entailment",
        ),
        ("ax_b", "SuperGLUE/AX-b/AX-b.jsonl", "{", "AX-b.jsonl, line 1 is not JSON"),
        ("ax_b", "SuperGLUE/AX-b/AX-b.jsonl", "[]", "AX-b.jsonl, line 1 is no object"),
        ("piqa", "piqa/dev-labels.lst", "1\n", "has 1 labels, expected 2"),
        ("piqa", "piqa/dev-labels.lst", None, "dev-labels.lst is missing, piqa/dev-labels.lst"),
        ("c3", "CLUE/C3/dev_0.json", '[[["a"], [{}], ""]]', "dialogue 1 is no dialogue"),
        ("mmlu", "mmlu/dev/virology_dev.csv", "q,one,two\n", "line 1 has no 'C'"),
        ("xsum", "Xsum/dev.jsonl", b"\xff", "cannot be read as text"),
        ("xsum", "Xsum/dev.jsonl", "\n", "Xsum/dev.jsonl is empty"),
        (
            "mmlu",
            "mmlu/dev/virology_dev.csv",
            'q,a,b,c,d,A\n"' + "q" * 200_000,
            "virology_dev.csv, line 2: field larger than field limit",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, task, file, content, said):
    folder = epath.Path(opencompass_files.write(tmp_path))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"^benchmark\.folder: ") as refused:
        asked(folder, task, "virology" if task == "mmlu" else "")
    assert said in str(refused.value)


def test_rows_of_the_paper_have_all_columns():
    assert {len(scores) for scores in PAPER.values()} == {len(SUITES["paper"])} == {10}
