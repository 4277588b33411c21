"""The ten benchmarks by which the paper (P1) compares models, as OpenCompass asks them.

The prompts are those of OpenCompass's configs/datasets (Apache-2.0), of the file that `source`
names; their white space is part of them, and so is that which OpenCompass puts between shots. The
paper does not state the prompts: chosen because it scored with OpenCompass. Most are those of its
`base_medium` collection, which has no CMMLU; of EPRSTMT's the one is taken that is a single text.
"""

import dataclasses

from pangu_tiny.benchmark.files import (
    csv_rows,
    dialogue_rows,
    exam_rows,
    json_rows,
    labelled_rows,
)
from pangu_tiny.benchmark.grades import first_letters, rouge_1, same_result
from pangu_tiny.benchmark.questions import LM_EVAL, Part, Task
from pangu_tiny.benchmark.subjects import CEVAL, CMMLU, MMLU

_LETTERS = ("A", "B", "C", "D")
_FOUR = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"

_CEVAL = Part(
    file="ceval/formal_ceval/val/{set}_val.csv",
    shots_file="ceval/formal_ceval/dev/{set}_dev.csv",
    read=csv_rows(),
    sets={name: {"subject": subject} for name, subject in CEVAL.items()},
    prompt="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n" + _FOUR + "答案: \n",
    choices=_LETTERS,
    gold="answer",
    labels=_LETTERS,
    shots=5,
    after_shot="\n\n\n",
    before="\n\n",
)

_CMMLU = Part(
    file="cmmlu/test/{set}.csv",
    shots_file="cmmlu/dev/{set}.csv",
    read=csv_rows(("", "question", "A", "B", "C", "D", "answer"), headed=True),
    sets={name: {"subject": subject} for name, subject in CMMLU.items()},
    prompt="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n题目：" + _FOUR,
    choices=tuple(f"答案是: {letter}" for letter in _LETTERS),
    gold="answer",
    labels=_LETTERS,
    shots=5,
    after_shot="\n\n\n",
    before="\n\n",
)

_MMLU = Part(
    file="mmlu/test/{set}_test.csv",
    shots_file="mmlu/dev/{set}_dev.csv",
    read=csv_rows(("question", "A", "B", "C", "D", "answer")),
    sets={name: {"subject": name.replace("_", " ")} for name in MMLU},
    head="The following are multiple choice questions (with answers) about  {subject}.\n\n",
    prompt=_FOUR + "Answer: ",
    choices=_LETTERS,
    gold="answer",
    labels=_LETTERS,
    shots=5,
    after_shot="\n",
    between="\n",
    before="\n",
)

_GAOKAO = {"chinese": "语文", "english": "英语", "geography": "地理", "history": "历史",
           "biology": "生物", "chemistry": "化学", "physics": "物理", "mathqa": "数学"}  # fmt: skip
_CHINESE = {
    **{
        f"gaokao-{name}": f"以下是一道中国高考{subject}选择题，请选择正确的答案。"
        for name, subject in _GAOKAO.items()
    },
    "logiqa-zh": "以下是一道中国公务员考试题，请选择正确的答案。",
}
_OF_FOUR = {"logiqa-en": "Logic Reasoning", "sat-math": "SAT Math", "sat-en": "SAT English",
            "sat-en-without-passage": "SAT English"}  # fmt: skip
_OF_FIVE = {"lsat-ar": "LSAT Analytical Reasoning", "lsat-lr": "LSAT Logical Reasoning",
            "lsat-rc": "LSAT Reading Comprehension", "aqua-rat": "AQUA-RAT"}  # fmt: skip


def _exam(intros: dict[str, str], answer: str, letters: str) -> Part:
    return Part(
        file="AGIEval/data/v1/{set}.jsonl",
        read=exam_rows,
        sets={name: {"intro": intro} for name, intro in intros.items()},
        prompt="{intro}\n{question}\n{options}\n",
        choices=tuple(answer + letter for letter in letters),
        gold="label",
        labels=tuple(letters),
        several=True,
    )


def _intros(kinds: dict[str, str]) -> dict[str, str]:
    return {
        name: f"The following is a {kind} question. Please select the correct answer."
        for name, kind in kinds.items()
    }


_EXAMS = _exam(_CHINESE, "答案是：", "ABCD")
_WRITTEN = dataclasses.replace(_EXAMS, choices=(), labels=(), several=False, tokens=1024)
_LAWYERS = dataclasses.replace(
    _WRITTEN,
    sets={
        "jec-qa-kd": {"intro": "以下是一道中国司法考试基础知识题，请选择正确的答案。"},
        "jec-qa-ca": {"intro": "以下是一道中国司法考试案例分析题，请选择正确的答案。"},
    },
    prompt=_EXAMS.prompt + "The answer is ",
    grade=first_letters,
)
_RESULTS = dataclasses.replace(
    _WRITTEN,
    sets={
        "gaokao-mathcloze": {
            "intro": "以下是一道中国高考数学填空题，请填入正确的答案。",
            "answer": "答案是：",
        },
        "math": {
            "intro": "The following is a Math question. Please select the correct answer.",
            "answer": "The answer is ",
        },
    },
    prompt="{intro}\n{question}{answer}",
    grade=same_result,
)

_BOOLQ = Part(
    file="SuperGLUE/BoolQ/val.jsonl",
    read=json_rows,
    prompt="{passage}\nQuestion: {question}?\n",
    choices=("No", "Yes"),
    gold="label",
    labels=("false", "true"),
)

_AX_B = Part(
    file="SuperGLUE/AX-b/AX-b.jsonl",
    read=json_rows,
    prompt="{sentence1}\n{sentence2}\nIs the sentence below entailed by the sentence above?\n",
    choices=("Yes", "No"),
    gold="label",
    labels=("entailment", "not_entailment"),
)

_PIQA = Part(
    file="piqa/dev.jsonl",
    read=labelled_rows,
    prompt="The following makes sense: \nQ: {goal}\nA: ",
    choices=("{sol1}\n", "{sol2}\n"),
    gold="label",
    labels=("0", "1"),
)

_EPRSTMT = Part(
    file="FewCLUE/eprstmt/dev_few_all.json",
    read=json_rows,
    prompt=' 内容： "{sentence}"。情绪分类：',
    choices=("消极。", "积极。"),
    gold="label",
    labels=("Negative", "Positive"),
)

_XSUM = Part(
    file="Xsum/dev.jsonl",
    read=json_rows,
    prompt="Document：{dialogue}\nBased on the previous text, provide a brief single summary:",
    gold="summary",
    most=1000,
    tokens=100,
    grade=rouge_1,
)

_C3 = Part(
    file="CLUE/C3/dev_0.json",
    read=dialogue_rows,
    prompt="文章：{content}\n问题：{question}\n",
    choices=tuple(f"答案：{{choice{i}}}" for i in range(4)),
    gold="label",
    labels=("0", "1", "2", "3"),
)

TASKS = {
    "ceval": Task("C-Eval", [_CEVAL], "val", 1346, "ceval/ceval_ppl_578f8d.py"),
    "cmmlu": Task("CMMLU", [_CMMLU], "test", 11582, "cmmlu/cmmlu_ppl_8b9c76.py"),
    "mmlu": Task("MMLU", [_MMLU], "test", 14042, "mmlu/mmlu_ppl_ac766d.py"),
    "mmlu_val": Task(
        "MMLU val",
        [dataclasses.replace(_MMLU, file="mmlu/val/{set}_val.csv")],
        "val",
        1531,
        "mmlu/mmlu_ppl_ac766d.py",
    ),
    "agieval": Task(
        "AGI-Eval",
        [
            _EXAMS,
            _exam(_intros(_OF_FOUR), "The answer is ", "ABCD"),
            _exam(_intros(_OF_FIVE), "The answer is ", "ABCDE"),
            _LAWYERS,
            _RESULTS,
        ],
        "v1",
        None,
        "agieval/agieval_mixed_2f14ad.py",
    ),
    "boolq": Task("BoolQ", [_BOOLQ], "val", 3270, "SuperGLUE_BoolQ/SuperGLUE_BoolQ_ppl_314b96.py"),
    "ax_b": Task("AX-b", [_AX_B], "test", 1104, "SuperGLUE_AX_b/SuperGLUE_AX_b_ppl_6db806.py"),
    "piqa": Task("PIQA", [_PIQA], "dev", 1838, "piqa/piqa_ppl_1cf9f0.py"),
    "eprstmt": Task(
        "EPRSTMT", [_EPRSTMT], "dev_few_all", 160, "FewCLUE_eprstmt/FewCLUE_eprstmt_ppl_1ce587.py"
    ),
    "xsum": Task("XSum", [_XSUM], "dev", 1000, "Xsum/Xsum_gen_31397e.py", "ROUGE-1"),
    "c3": Task("C3", [_C3], "dev", 1825, "CLUE_C3/CLUE_C3_ppl_e24a31.py"),
}
SUITES = {
    "paper": tuple(name for name in TASKS if name != "mmlu_val"),
    "ablation": (f"{LM_EVAL}arc_easy", f"{LM_EVAL}hellaswag", "c3"),
}
"""Tasks by the name of their suite: of the paper's table of results, in its order, and those by
whose mean it compares its ablations."""

PAPER = {
    "MobileLLaMA-1.4B": (23.93, 25.10, 25.05, 18.53, 58.75, 45.20, 71.27, 46.25, 18.19, 37.42),
    "Sheared-LLaMA-1.3B": (24.28, 25.10, 25.77, 18.01, 62.39, 43.57, 72.91, 46.25, 16.44, 35.45),
    "TinyLLaMA-1.1B": (27.85, 24.64, 25.75, 18.54, 56.06, 45.47, 70.62, 46.25, 20.15, 36.71),
    "PanGu-π-1B": (36.85, 35.90, 35.96, 30.77, 58.44, 43.48, 61.92, 55.62, 15.92, 49.21),
    "PanGu-π-1B Pro": (46.50, 46.56, 50.38, 41.58, 63.43, 53.99, 64.96, 74.38, 18.40, 52.66),
    "Qwen-1.8B": (53.60, 52.12, 46.43, 35.83, 64.31, 57.79, 73.83, 88.12, 20.03, 58.30),
    "PanGu-π-1.5B Pro": (52.91, 49.51, 53.76, 44.42, 63.73, 55.93, 73.94, 89.38, 22.23, 59.56),
}
"""Rows of the paper's table of results, in the order of its suite."""
