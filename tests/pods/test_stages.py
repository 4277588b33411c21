"""Whole stages with their workdirs on gs://, killed and started again."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import opencompass_files
import pytest
from checkpoint_files import write_checkpoint
from etils import epath
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from shapes import TINY, random_params
from tiny_runs import EIGHT, assert_same_bits, command, run, start, start_together, state_of

from pangu_tiny.benchmark.benchmark import benchmark
from pangu_tiny.checkpoints.read import is_finished, numbered, open_checkpoint
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.convert.llama import tensors
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.evaluation.generate import generate
from pangu_tiny.inherit.inherit import inherit
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.masks import MaskTraining
from pangu_tiny.inherit.rank_teacher import rank_teacher
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.training.metrics import read_metrics, read_row_losses

pytestmark = pytest.mark.pods

STEPS = 8


def unfinished(workdir):
    folder = epath.Path(workdir) / "checkpoints"
    return [step for step in numbered(folder) if not is_finished(folder / str(step))]


def kill_inside_a_save(process, workdir, first, log):
    """Freezes it while a step from `first` on is there in part, and kills it then."""
    while True:
        while not any(step >= first for step in unfinished(workdir)):
            assert process.poll() is None, f"it ended too early: {log.read_text()}"
        process.send_signal(signal.SIGSTOP)
        if any(step >= first for step in unfinished(workdir)):
            process.kill()
            return process.wait()
        process.send_signal(signal.SIGCONT)


def test_killed_inside_a_save_a_run_goes_on_to_the_same_bits(dataset, bucket, tmp_path):
    """Those of a run on a local folder; so are its figures, and what is evaluated of it."""
    settings = {"steps": STEPS, "save_every": 2, "keep_every": 4, "evaluate_every": 4}
    there, here, log = f"{bucket}/killed", str(tmp_path / "run"), tmp_path / "log"
    process = start(command(dataset.path, there, EIGHT, **settings), 8, log)
    kill_inside_a_save(process, there, 4, log)
    results = []
    for workdir in (there, here):
        assert run(dataset.path, workdir, **settings).step == STEPS
        results.append(evaluate(workdir, dataset.path, f"{workdir}-evaluation", EIGHT))
    assert results[0] == results[1] and not unfinished(there)
    assert_same_bits(state_of(there, STEPS), state_of(here, STEPS))
    np.testing.assert_array_equal(read_row_losses(there), read_row_losses(here))
    lines = [
        [(line["step"], line.get("loss"), line.get("held_out_bits_per_byte")) for line in found]
        for found in map(read_metrics, (there, here))
    ]
    assert lines[0] == lines[1] and len(lines[0]) == STEPS + 2


def test_two_processes_train_in_rounds(dataset, bucket, tmp_path):
    """Killed while they score what they have trained, and started again."""
    workdir = f"{bucket}/rounds"
    argv = command(dataset.path, "", EIGHT, steps=STEPS, save_every=4, keep_every=4)
    argv[argv.index("train")] = "train-rounds"
    bindings = {"train_rounds.dataset": dataset.path, "train_rounds.workdir": workdir}
    bindings |= {"score_batches.save_minutes": 0, "score_batches.batch_size": 8}
    argv += [f"--gin.{name}={value}" for name, value in bindings.items()]
    processes = start_together(argv, tmp_path)
    while not (epath.Path(workdir) / "scores_2" / "row_losses").exists():
        with contextlib.suppress(subprocess.TimeoutExpired):  # looking all the time would slow it
            processes[0].wait(timeout=0.2)
            raise AssertionError((tmp_path / "log0").read_text())
    for process in processes:
        process.kill()
        process.wait()
    codes = [process.wait() for process in start_together(argv, tmp_path)]
    assert codes == [0, 0], (tmp_path / "log0").read_text()
    assert Scores.open(f"{workdir}/scores_2").round.batches == STEPS
    last = f"{workdir}/round_2"
    drawn, trained = read_row_losses(last)["row"], read_row_losses(f"{workdir}/round_1")["row"]
    assert len(drawn) == len(trained) / 2 and set(drawn) < set(trained)
    found = evaluate(last, dataset.path, f"{workdir}/evaluation", EIGHT)
    logged = read_metrics(last)[-1]["held_out_bits_per_byte"]
    assert found["bits_per_byte"] == pytest.approx(logged, rel=1e-5)


TEACHER = ModelShape(depth=2, width=32, heads=4, kv_heads=2, ffn_width=48, vocab_size=300)
STUDENT = ModelShape(
    depth=1, width=24, heads=2, kv_heads=1, head_dim=8, ffn_width=32, vocab_size=300
)


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """A random model in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("llama")
    random = np.random.default_rng(0)
    sizes = dict(tensors(TEACHER).values())
    weights = {name: random.normal(size=size).astype("float32") for name, size in sizes.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": TEACHER.width,
        "intermediate_size": TEACHER.ffn_width,
        "max_position_embeddings": 64,
        "num_attention_heads": TEACHER.heads,
        "num_hidden_layers": TEACHER.depth,
        "num_key_value_heads": TEACHER.kv_heads,
        "rms_norm_eps": TEACHER.norm_eps,
        "rope_theta": TEACHER.rope_theta,
        "vocab_size": TEACHER.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_model_is_imported_ranked_and_cut(llama, dataset, bucket, tmp_path):
    """To the same bits as on a local folder."""
    choice, masks = LayerChoice(first=0, last=0), MaskTraining(steps=2, save_every=1)
    cuts = []
    for folder in (f"{bucket}/cut", str(tmp_path / "cut")):
        import_hf(llama, f"{folder}/teacher")
        rank_teacher(
            f"{folder}/teacher",
            f"{folder}/importance",
            EIGHT,
            choice,
            masks,
            dataset.path,
            model=STUDENT,
            output_grams=True,
            calibration_batches=2,
            batch_size=8,
        )
        inherit(
            f"{folder}/teacher",
            f"{folder}/student",
            choice,
            STUDENT,
            importance=f"{folder}/importance",
            correct_outputs=True,
        )
        cuts.append(open_checkpoint(f"{folder}/student"))
    there, here = cuts
    assert there.shape == here.shape == STUDENT
    assert_same_bits(*(flatten_dict(cut.params(), sep="/") for cut in cuts))


def test_two_processes_generate(tokenizer, tmp_path):
    """What one gives; the first says it."""
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    model = write_checkpoint(tmp_path / "model", shape, random_params(shape), tokenizer, 64)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\na\nsat 世界\n")
    bindings = {"generate.checkpoint": model, "generate.prompts": prompts, "generate.tokens": 8}
    bindings |= {f"Hardware.{name}": value for name, value in vars(EIGHT).items()}
    argv = [sys.executable, "-m", "pangu_tiny", "generate"]
    argv += [f"--gin.{name}={value}" for name, value in bindings.items()]
    argv += [f"--gin.generate.workdir={tmp_path / 'out'}"]
    codes = [process.wait() for process in start_together(argv, tmp_path)]
    logs = [(tmp_path / f"log{index}").read_text() for index in (0, 1)]
    assert codes == [0, 0], logs
    told = generate(model, EIGHT, prompts=str(prompts), tokens=8)
    assert (tmp_path / "out" / "generated.jsonl").read_text() == told
    assert told in logs[0] and '"prompt"' not in logs[1]


def test_two_processes_benchmark(tokenizer, bucket, tmp_path):
    """What one does, and they go on from what one of them kept."""
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    model = write_checkpoint(tmp_path / "model", shape, random_params(shape), tokenizer, 96)
    folder, tasks = str(opencompass_files.write(tmp_path / "data")), ["boolq", "xsum", "c3"]
    here = benchmark(model, folder, str(tmp_path / "here"), EIGHT, tasks=tasks)
    bindings = {"checkpoint": model, "folder": folder, "workdir": f"{bucket}/benchmark"}
    flags = [f"--gin.benchmark.{name}={value}" for name, value in bindings.items()]
    flags += [f"--gin.benchmark.tasks={tasks}", "--gin.benchmark.save_seconds=0"]
    flags += [f"--gin.Hardware.{name}={value}" for name, value in vars(EIGHT).items()]
    argv = [sys.executable, "-m", "pangu_tiny", "benchmark", *flags]
    codes = [process.wait() for process in start_together(argv, tmp_path)]
    assert codes == [0, 0], (tmp_path / "log0").read_text()
    there = epath.Path(bucket) / "benchmark"
    assert json.loads((there / "benchmark.json").read_text()) == here
    answers = json.loads((there / "answers.json").read_text())
    for key, answer in json.loads((tmp_path / "here" / "answers.json").read_text()).items():
        assert answers[key] == (answer if isinstance(answer, str) else pytest.approx(answer))
