"""launch/slice.py: what the scripts are told of a stage, and what is refused."""

import importlib.util
import json

import pytest
from stand_ins import REPOSITORY

_spec = importlib.util.spec_from_file_location("launch_slice", REPOSITORY / "launch/slice.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

EVALUATE = [
    "evaluate",
    "--gin.evaluate.checkpoint=gs://b/c",
    "--gin.evaluate.dataset=/data/d",
    "--gin.evaluate.workdir=gs://b/e",
]


@pytest.fixture
def told(capsys):
    def told(*words):
        code = _module.main(list(words))
        out, err = capsys.readouterr()
        if code:
            return code, err
        return [line.partition("=")[::2] for line in out.splitlines()]

    return told


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e-256", "16x16 1 64 4 tpu-v5-lite-podslice ct5lp-hightpu-4t v5litepod-256"),
        ("2 × v5e:16x16", "16x16 2 64 4 tpu-v5-lite-podslice ct5lp-hightpu-4t v5litepod-256"),
        ("v5e-8", "2x4 1 1 8 tpu-v5-lite-podslice ct5lp-hightpu-8t v5litepod-8"),
        ("v6e-1", "1x1 1 1 1 tpu-v6e-slice ct6e-standard-1t v6e-1"),
        ("v6e-16", "4x4 1 4 4 tpu-v6e-slice ct6e-standard-4t v6e-16"),
        ("v4-256", "4x4x8 1 32 4 tpu-v4-podslice ct4p-hightpu-4t v4-256"),
        ("v4-8", "2x2x1 1 1 4 tpu-v4-podslice ct4p-hightpu-4t v4-8"),
        ("v5p:4x4x8", "4x4x8 1 32 4 tpu-v5p-slice ct5p-hightpu-4t v5p-256"),
    ],
)
def test_names_of_slices(told, topology, expected):
    lines = dict(told(*EVALUATE, f"--gin.Hardware.topology={topology}"))
    names = ("topology", "slices", "hosts", "chips", "label", "machine", "accelerator")
    assert " ".join(lines[name] for name in names) == expected
    assert lines["workers"] == "all"


def test_a_stage_for_one_worker_needs_no_slice(told):
    words = ["count-tokens", "--gin.count_tokens.dataset=/data/d", "--gin.count_tokens.workdir=w"]
    lines = dict(told(*words))
    assert lines["workers"] == "first" and "topology" not in lines


def test_words_arrive_as_they_are(told):
    odd = '--gin.evaluate.workdir=gs://b/it\'s "π" $(HOME) $$ \\x'
    lines = told(*EVALUATE[:3], odd, "--gin.Hardware.topology=v5e-8")
    words = [json.loads(value) for name, value in lines if name == "word"]
    assert words[4] == odd.replace("$", "$$")
    assert words[:2] == ["pangu-tiny", "evaluate"]


def test_own_gin_files_travel(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.gin").write_text("include 'b.gin'\ninclude 'hardware/v5e_256.gin'\n")
    (tmp_path / "b.gin").write_text("evaluate.dtype = 'bfloat16'  # größer\n")
    lines = told(*EVALUATE, "--gin_file=mine/a.gin")
    assert [value for name, value in lines if name == "file"] == ["mine/a.gin", "b.gin"]
    texts = [json.loads(value) for name, value in lines if name == "text"]
    assert texts[1] == (tmp_path / "b.gin").read_text()
    code, error = told(*EVALUATE, f"--gin_file={tmp_path / 'mine/a.gin'}")
    assert code == 2 and "expected a path below the current folder" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*EVALUATE, "--gin_file=hardware/gpu.gin"], "no Hardware.topology is bound"),
        ([*EVALUATE, "--gin_file=hardware/v9.gin"], "no such file"),
        ([*EVALUATE, "--gin.Hardware.topology=v5e-7"], "expected one of"),
        ([*EVALUATE, "--gin.Hardware.topology=v4:16x16x16"], "sold up to 8x16x16"),
        ([*EVALUATE[:3], "--gin.Hardware.topology=v5e-8"], "evaluate.workdir must be given"),
        ([*EVALUATE, "--gin.evaluate.workdir=a\nb"], "line break"),
    ],
)
def test_refused_in_one_line(told, words, said):
    code, error = told(*words)
    assert code == 2 and said in error and error.count("\n") == 1


def test_unknown_stage(capsys):
    with pytest.raises(SystemExit) as stopped:
        _module.main(["trian"])
    assert stopped.value.code == 2 and "invalid choice: 'trian'" in capsys.readouterr().err
