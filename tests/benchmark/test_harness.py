"""lm-evaluation-harness on its own adapter of Hugging Face's models, and on ours."""

import json
import sys

import pytest
from checkpoint_files import write_checkpoint
from etils import epath
from shapes import random_params

from pangu_tiny.benchmark.benchmark import benchmark
from pangu_tiny.benchmark.paper_tasks import TASKS
from pangu_tiny.errors import UserError
from pangu_tiny.topology.hardware import Hardware

TASK_FILES = {
    "choice": """
        task: local_choice
        dataset_path: json
        dataset_kwargs: {data_files: {test: choice.jsonl}}
        output_type: multiple_choice
        test_split: test
        doc_to_text: "Question: {{goal}}\\nAnswer:"
        doc_to_target: label
        doc_to_choice: "{{[sol1, sol2]}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "letters": """
        task: local_letters
        dataset_path: json
        dataset_kwargs: {data_files: {test: letters.jsonl}}
        output_type: multiple_choice
        test_split: test
        fewshot_split: test
        num_fewshot: 5
        fewshot_config: {sampler: first_n}
        doc_to_text: "{{question}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案："
        doc_to_choice: ["A", "B", "C", "D"]
        doc_to_target: "{{['A', 'B', 'C', 'D'].index(answer)}}"
    """,
    "rolling": """
        task: local_rolling
        dataset_path: json
        dataset_kwargs: {data_files: {test: texts.jsonl}}
        output_type: loglikelihood_rolling
        test_split: test
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
    "last": """
        task: local_last
        dataset_path: json
        dataset_kwargs: {data_files: {test: texts.jsonl}}
        output_type: loglikelihood
        test_split: test
        doc_to_text: "{{text[:60]}}"
        doc_to_target: "{{text[60:90]}}"
        metric_list: [{metric: perplexity}, {metric: acc}]
    """,
    "written": """
        task: local_written
        dataset_path: json
        dataset_kwargs: {data_files: {test: texts.jsonl}}
        output_type: generate_until
        test_split: test
        doc_to_text: "{{text[:200]}}"
        doc_to_target: "{{text[200:300]}}"
        generation_kwargs: {until: [".", "\\n\\n"], max_gen_toks: 48, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
    "alike": """
        task: local_alike
        dataset_path: json
        dataset_kwargs: {data_files: {test: texts.jsonl}}
        output_type: loglikelihood
        test_split: test
        doc_to_text: "Sentence:"
        doc_to_target: " {{text[:300]}}"
        metric_list: [{metric: acc}]
    """,
}
NAMES = [f"lm-eval:local_{name}" for name in TASK_FILES]


@pytest.fixture(scope="module")
def local(real_data, tmp_path_factory):
    """Task files of every kind, and what they read: PIQA, CMMLU, novels."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASK_FILES.items():
        (folder / f"{name}.yaml").write_text("\n".join(line[8:] for line in text.splitlines()))
    benchmarks = epath.Path(real_data / "benchmarks")
    rows: dict[str, list] = {"choice": [], "letters": [], "texts": []}
    (piqa,), (cmmlu,) = TASKS["piqa"].parts, TASKS["cmmlu"].parts
    for row in list(piqa.read(benchmarks / piqa.file))[:40]:
        rows["choice"].append({**row.fields, "label": int(row.fields["label"])})
    for row in list(cmmlu.read(benchmarks / cmmlu.file.format(set="anatomy")))[:30]:
        rows["letters"].append(dict(row.fields))
    with open(real_data / "corpora" / "en_gutenberg.jsonl") as file:
        rows["texts"] = [{"text": json.loads(file.readline())["text"][:3000]} for _ in range(10)]
    for name, of_file in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_file)))
    return folder


def asked(model, local):
    """By task, what each document was answered."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(local), include_defaults=False)
    loaded = manager.load([name.removeprefix("lm-eval:") for name in NAMES])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=1234)
    found = evaluate(model, loaded, bootstrap_iters=0)
    return {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in found["samples"].items()
    }


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["stories260k", "20M"])
def test_every_request_is_answered_alike(kind, local, real_data, tmp_path, monkeypatch):
    """Each within 1e-3, and what is written is the same text."""
    import jax
    from lm_eval.models.huggingface import HFLM

    from pangu_tiny.benchmark.answers import Answers
    from pangu_tiny.benchmark.examined import Examined
    from pangu_tiny.benchmark.harness_model import HarnessModel
    from pangu_tiny.checkpoints.read import open_checkpoint
    from pangu_tiny.convert.export_hf import export_hf
    from pangu_tiny.convert.import_hf import import_hf
    from pangu_tiny.data.rows import Marks
    from pangu_tiny.model.shape import ModelShape
    from pangu_tiny.program.build import build
    from pangu_tiny.tokenizer.model import Tokenizer

    monkeypatch.chdir(local)
    if kind == "stories260k":
        checkpoint = import_hf(str(real_data / "checkpoints" / kind), str(tmp_path / "run"))
    else:
        tokenizer = Tokenizer.open(real_data / "tokenizers" / "mistral_v1_32000.model")
        shape = ModelShape(8, 320, 5, 864, 32000, tied=True)
        params = random_params(shape)
        # Bytes that are no character are told in other ways: here none is ever the likeliest.
        table = params["embedding"]["table"]
        params["embedding"]["table"] = table.at[3:259].set(0)
        checkpoint = write_checkpoint(tmp_path / "run", shape, params, tokenizer, 1024)
    exported = export_hf(str(checkpoint), str(tmp_path / "hf"))
    opened = open_checkpoint(checkpoint)
    program = build(opened.shape, Hardware(), Marks(0, 0), "float32")
    with jax.set_mesh(program.mesh):
        answers = Answers(epath.Path(tmp_path / "answers.json"), 1e9)
        ours = asked(HarnessModel(Examined(opened, program, answers, 16)), local)
    theirs = asked(HFLM(pretrained=str(exported), device="cpu", dtype="float32"), local)
    assert set(ours) == {name.removeprefix("lm-eval:") for name in NAMES}
    for name, documents in theirs.items():
        assert len(documents) == len(ours[name]) >= 10
        if name == "local_written":
            assert ours[name] == documents
            continue
        for found, wanted in zip(ours[name], documents, strict=True):
            for one, other in zip(found, wanted, strict=True):
                if isinstance(other, tuple):
                    assert one[1] == other[1], name
                    one, other = one[0], other[0]
                assert one == pytest.approx(other, abs=1e-3, rel=1e-5), name


def run(local, checkpoint, workdir, **settings):
    given = {"task_files": str(local), "hardware": Hardware()} | settings
    return benchmark(str(checkpoint), str(local), str(workdir), **given)


@pytest.fixture(scope="module")
def stories(real_data, tmp_path_factory):
    from pangu_tiny.convert.import_hf import import_hf

    source = real_data / "checkpoints" / "stories260k"
    return import_hf(str(source), str(tmp_path_factory.mktemp("stories") / "run"))


@pytest.mark.parity
def test_the_stage_tells_what_lm_eval_computes(local, stories, tmp_path, capsys, monkeypatch):
    """Of choices the share that is right, counted here; and what is answered is not asked again."""
    found = run(local, stories, tmp_path / "out", tasks=NAMES, questions=8)
    (letters,) = [one for name, one in found["lm_eval"].items() if name.endswith("letters")]
    assert (letters["shots"], letters["questions"]) == (5, 8)
    assert letters["metric"] == "acc_norm,none"
    assert letters["score"] == 100 * letters["metrics"]["acc_norm,none"]
    assert found["lm_eval"]["lm-eval:local_rolling"]["score"] is None
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == found
    said = capsys.readouterr().out
    assert "lm-eval:local_rolling word_perplexity" in said and "± " in said
    assert "By lm-evaluation-harness" in (tmp_path / "out" / "report.html").read_text()
    for asked_for in ("score", "Drawing"):
        monkeypatch.setattr(f"pangu_tiny.benchmark.examined.{asked_for}", None)
    assert run(local, stories, tmp_path / "out", tasks=NAMES, questions=8) == found
    with pytest.raises(UserError, match=r"holds another run: lm_eval\.questions is"):
        run(local, stories, tmp_path / "out", tasks=NAMES, questions=7)


@pytest.mark.parity
def test_a_copy_of_a_repository_is_read_below_the_folder(local, stories, tmp_path):
    """ARC-Easy is two rows here; its task file is lm-eval's own."""
    row = {"id": "1", "question": "?", "answerKey": "B"}
    row["choices"] = {"text": ["a", "b"], "label": ["A", "B"]}
    where = tmp_path / "allenai" / "ai2_arc"
    where.mkdir(parents=True)
    splits = ("train", "validation", "test")
    for split in splits:
        (where / f"{split}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    lines = [f"  - {{split: {split}, path: {split}.jsonl}}" for split in splits]
    configs = ["---", "configs:", "- config_name: ARC-Easy", "  data_files:", *lines, "---", ""]
    (where / "README.md").write_text("\n".join(configs))
    found = run(tmp_path, stories, tmp_path / "out", tasks=["lm-eval:arc_easy"])
    assert found["lm_eval"]["lm-eval:arc_easy"]["questions"] == 2
    assert found["average"] == found["lm_eval"]["lm-eval:arc_easy"]["score"]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("arc_esy", "'?lm-eval:arc_esy'? is unknown, expected lm-eval:arc_easy or"),
        ("hellaswag", "lm-eval:hellaswag could not be read: .*Rowan/hellaswag.* looked for in"),
        ("local_label", "a row of lm-eval:local_label cannot be asked: 'E' is not in list"),
        ("local_beams", "lm-eval:local_beams sets num_beams, which generation does not know"),
        (
            "local_long",
            "lm-eval:local_long writes 600 tokens, but the model was trained on sequences of 512",
        ),
        ("local_lacking", "lm-eval:local_lacking could not be read: 'nothing' is undefined"),
    ],
)
def test_mistakes_are_one_line(local, stories, tmp_path, task, said):
    written = (local / "written.yaml").read_text()
    long = written.replace("max_gen_toks: 48", "max_gen_toks: 600")
    lacking = written.replace("text[:200]", "nothing")
    beams = written.replace("max_gen_toks: 48", "max_gen_toks: 48, num_beams: 4")
    label = (local / "letters.yaml").read_text().replace("num_fewshot: 5", "num_fewshot: 0")
    label = label.replace("letters.jsonl", str(tmp_path / "label.jsonl"))
    row = dict.fromkeys(("question", *"ABCD"), "?") | {"answer": "A"}
    rows = [row, row | {"answer": "E"}]  # the first is tried when the task is read
    (tmp_path / "label.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = {"long": long, "lacking": lacking, "beams": beams, "label": label}
    for name, text in texts.items():
        named = text.replace("local_written", f"local_{name}").replace(
            "local_letters", "local_label"
        )
        (tmp_path / f"{name}.yaml").write_text(named)
    with pytest.raises(UserError, match=said):
        run(local, stories, tmp_path / "out", tasks=[f"lm-eval:{task}"], task_files=str(tmp_path))


@pytest.mark.parity
def test_no_row_is_longer_than_the_longest_text(local, stories, tmp_path, monkeypatch):
    """Ten documents that have one context are not one question of ten choices."""
    from pangu_tiny.benchmark import examined

    lengths, whole = [], examined.rows_of
    monkeypatch.setattr(examined, "rows_of", lambda sizes: lengths.extend(sizes) or whole(sizes))
    run(local, stories, tmp_path / "out", tasks=["lm-eval:local_alike"])
    assert len(lengths) > 1 and max(lengths) <= 512


def test_without_lm_eval_it_is_said_what_to_install(stories, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"lm-eval:arc_easy needs .*: pip install 'pangu_tiny\[b"):
        run(tmp_path, stories, tmp_path / "out", suite="ablation")
