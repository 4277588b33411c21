"""The likelihoods that lm-evaluation-harness asks for, by this project's adapter and by its own of
Hugging Face's models, taking turns: a 20M LLaMA shape, float32, 200 questions.

python tests/benchmarks/harness_speed.py --data=FOLDER --task=piqa|cmmlu [--rounds=5]
    [--batch=32] [--gin_file=hardware/cpu.gin]

PIQA without shots, CMMLU with five; FOLDER is OpenCompass's `data`. The time taken includes that in
which texts become ids. What is compiled is compiled before, and said. The aims are 1.3 times on
PIQA and 1.0 on CMMLU. Needs `pip install '.[parity]'`.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import train_speed
from decode_speed import llama_config
from train_speed import SHAPE, median, take_turns

QUESTIONS, SHOTS = 200, 5


def pairs(data: str, task: str) -> list[tuple[str, str]]:
    """Context and continuation of every choice."""
    from etils import epath

    from pangu_tiny.benchmark.paper_tasks import TASKS

    (part,) = TASKS[task].parts
    folder, found = epath.Path(data), []
    if task == "piqa":
        for row in list(part.read(folder / part.file))[:QUESTIONS]:
            context = f"Question: {row.fields['goal']}\nAnswer:"
            found += [(context, f" {row.fields[name]}") for name in ("sol1", "sol2")]
        return found
    for subject in part.sets:
        described = (
            f"以下是关于{part.sets[subject]['subject']}的单项选择题，请直接给出正确答案的选项。\n\n"
        )
        shown, asked = (
            [
                "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案：".format(**row.fields)
                for row in part.read(folder / file.format(set=subject))
            ]
            for file in (part.shots_file, part.file)
        )
        shots = "".join(f"{text} A\n\n" for text in shown[:SHOTS])
        # A few of each, so that texts are of as many lengths as in the whole.
        found += [(described + shots + text, f" {label}") for text in asked[:3] for label in "ABCD"]
    return found[: 4 * QUESTIONS]


def make(data: str, folder: pathlib.Path) -> None:
    """The model in both layouts, its weights at random; a tokenizer of the texts of both tasks."""
    import torch
    from transformers import LlamaForCausalLM

    from pangu_tiny.convert.export_hf import export_hf
    from pangu_tiny.convert.import_hf import import_hf
    from pangu_tiny.tokenizer.model import train_tokenizer

    torch.manual_seed(0)
    texts = {"".join(pair) for task in ("piqa", "cmmlu") for pair in pairs(data, task)}
    tokenizer = train_tokenizer(sorted(texts), SHAPE["vocab_size"])
    config = llama_config(bos_token_id=tokenizer.begin_id, eos_token_id=tokenizer.end_id)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    (folder / "llama" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    checkpoint = import_hf(str(folder / "llama"), str(folder / "run"))
    export_hf(str(checkpoint), str(folder / "hf"))


def make_pangu_tiny(options: argparse.Namespace) -> Callable[[list[Any]], None]:
    import jax
    from etils import epath

    from pangu_tiny import config
    from pangu_tiny.benchmark.answers import Answers
    from pangu_tiny.benchmark.examined import Examined
    from pangu_tiny.benchmark.harness_model import HarnessModel
    from pangu_tiny.checkpoints.read import open_checkpoint
    from pangu_tiny.data.rows import Marks
    from pangu_tiny.program.build import build
    from pangu_tiny.topology.hardware import Hardware
    from pangu_tiny.topology.host import keep_freed_memory

    keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    folder = epath.Path(options.folder)
    opened = open_checkpoint(folder / "run")
    hardware = config.build(Hardware, options.gin_file)
    program = build(opened.shape, hardware, Marks(0, 0), "float32")
    answers = Answers(folder / "answers.json", 1e9)
    examined = Examined(opened, program, answers, options.batch)

    def run(requests: list[Any]) -> list[tuple[float, bool]]:
        answers.by_key.clear()
        with jax.set_mesh(program.mesh):
            return HarnessModel(examined).loglikelihood(requests)

    return run


def make_hugging_face(options: argparse.Namespace) -> Callable[[list[Any]], None]:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(train_speed.cores())
    folder = str(pathlib.Path(options.folder) / "hf")
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=options.batch)
    return model.loglikelihood


def serve(options: argparse.Namespace) -> None:
    from lm_eval.api.instance import Instance

    make_model = make_pangu_tiny if options.serve == "pangu_tiny" else make_hugging_face
    answer = make_model(options)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        for pair in pairs(options.data, options.task)
    ]
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        total = sum(found for found, _ in answer(requests))
        taken.append(time.perf_counter() - start)
    compiled = f"compiled in about {taken[0] - taken[1]:.1f} s"
    print(f"{options.serve}: {compiled}, log-likelihoods {total:.3f} in all", file=sys.stderr)
    train_speed.answer(lambda: answer(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", choices=("piqa", "cmmlu"), required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--gin_file", default="hardware/cpu.gin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(options.data, pathlib.Path(folder))
        names = ("pangu_tiny", "Hugging Face")
        own = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--serve"]
        seconds = take_turns({name: [*own, name] for name in names}, options.rounds, 1)
    ours, theirs = (median(seconds[name]) for name in names)
    for name, taken in seconds.items():
        times = sorted(one for of_round in taken for one in of_round)
        speed = f"{QUESTIONS / median(taken):6.2f} questions/s"
        print(f"{name:14} {speed}, {times[0]:.2f} to {times[-1]:.2f} s")
    print(f"ratio: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
