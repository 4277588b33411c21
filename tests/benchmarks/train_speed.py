"""This project's train step on a CPU, a 20M LLaMA shape, taking turns with PyTorch's, or with that
of another checkout of this project.

python tests/benchmarks/train_speed.py [--torch_python=PYTHON] [--rounds=8] [--steps=3]
python tests/benchmarks/train_speed.py --against=CHECKOUT --rounds=10 --steps=24

The first needs torch and transformers (`pip install '.[parity]'`), in this environment or in that
of --torch_python. PyTorch runs transformers' LlamaForCausalLM with SDPA and fused AdamW, eagerly
and under torch.compile; "memory kept" gives it the allocator setting that this project makes on a
CPU (see `topology/host.py`), which PyTorch's users would have to know of. All are float32, with as
many threads as there are cores, the same clipping, decay and number of tokens. The ratio that
counts is that of the medians against the faster of PyTorch's eager and compiled; 1.1 is the aim.

The second runs the benchmark of each checkout in this environment. The ratio of the medians comes
with what 95 of 100 redraws of the rounds give; it should reach 0.98.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

BATCH, SEQUENCE = 16, 256
SHAPE = {"depth": 8, "width": 384, "heads": 6, "ffn_width": 1024, "vocab_size": 8192}
CONTENDERS = (
    "pangu_tiny",
    "PyTorch eager",
    "PyTorch compiled",
    "PyTorch eager, memory kept",
    "PyTorch compiled, memory kept",
)


def make_pangu_tiny(name: str) -> Callable[[], float]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from pangu_tiny.topology.host import keep_freed_memory

    keep_freed_memory()
    import jax
    import numpy as np

    from pangu_tiny import config
    from pangu_tiny.data.rows import Marks
    from pangu_tiny.model.shape import ModelShape
    from pangu_tiny.program.build import build, build_training
    from pangu_tiny.program.feed import Feed
    from pangu_tiny.program.optimizer import Optimizer
    from pangu_tiny.program.step import init_state
    from pangu_tiny.topology.hardware import Hardware

    hardware = config.build(Hardware, "hardware/cpu.gin")
    program = build(ModelShape(**SHAPE), hardware, Marks(1, 2), "float32")
    optimizer = Optimizer(learning_rate=3e-4)
    training = build_training(program, optimizer, 1000, BATCH, SEQUENCE)
    feed, mesh = Feed(training.layout), program.mesh
    rows = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (BATCH, SEQUENCE + 1))
    local = {"rows": rows.astype(np.int32), "row_ids": np.arange(BATCH)}
    decoder = program.objective.decoder
    state = [init_state(decoder, training.optimizer, "constant", 0, mesh)]

    def run() -> float:
        with jax.set_mesh(mesh):
            state[0], metrics = training.step(state[0], feed.place(local))
            jax.block_until_ready(state[0])
        return float(metrics.loss)

    return run


def make_pytorch(name: str) -> Callable[[], float]:
    if "memory kept" in name:
        import ctypes

        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, -1), (-8, 1)):  # see topology/host.py
            libc.mallopt(option, value)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["width"],
            intermediate_size=SHAPE["ffn_width"],
            num_hidden_layers=SHAPE["depth"],
            num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["heads"],
            rms_norm_eps=1e-5,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=3e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model) if "compiled" in name else model
    tokens = torch.randint(3, SHAPE["vocab_size"], (BATCH, SEQUENCE))

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def cores() -> int:
    return len(os.sched_getaffinity(0))


def serve(name: str) -> None:
    """A child: steps as often as a line on standard input says, and answers with seconds."""
    run = (make_pangu_tiny if name == "pangu_tiny" else make_pytorch)(name)
    run()
    run()
    answer(run)


def answer(run: Callable[[], object]) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def take_turns(
    commands: dict[str, list[str]], rounds: int, steps: int, **environments: dict[str, str]
) -> dict[str, list[list[float]]]:
    """Seconds of the steps of every round, by contender."""
    children = {}
    for name, command in commands.items():
        children[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environments.get(name, {}),
        )
        if children[name].stdout.readline() != "ready\n":
            sys.exit(f"{name} did not start; see above")
        print(f"{name}: ready", file=sys.stderr)
    seconds = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        for name, child in children.items():
            print(steps, file=child.stdin, flush=True)
            seconds[name].append(json.loads(child.stdout.readline()))
        medians = (
            f"{name} {statistics.median(taken[-1]):.3f} s" for name, taken in seconds.items()
        )
        print(f"round {number} of {rounds}: {', '.join(medians)}", file=sys.stderr)
    for child in children.values():
        child.stdin.close()
        child.wait()
    return seconds


def median(rounds: list[list[float]]) -> float:
    return statistics.median(itertools.chain(*rounds))


def show(seconds: dict[str, list[list[float]]], tokens: int = BATCH * SEQUENCE) -> None:
    for name, rounds in seconds.items():
        times = list(itertools.chain(*rounds))
        low, _, high = statistics.quantiles(times, n=4)
        print(
            f"{name:30} {tokens / median(rounds):6.0f} tokens/s, median of {len(times)} "
            f"steps {median(rounds):.3f} s, quartiles {low:.3f} to {high:.3f}"
        )


def compare(torch_python: str, rounds: int, steps: int) -> None:
    commands = {
        name: [sys.executable if name == "pangu_tiny" else torch_python, __file__, "--serve", name]
        for name in CONTENDERS
    }
    seconds = take_turns(commands, rounds, steps)
    show(seconds)
    for kind in ("", ", memory kept"):
        fastest = min(median(seconds[f"PyTorch {mode}{kind}"]) for mode in ("eager", "compiled"))
        print(f"ratio to the faster PyTorch{kind}: {fastest / median(seconds['pangu_tiny']):.3f}")


def compare_checkouts(other: str, rounds: int, steps: int) -> None:
    roots = {
        "this": pathlib.Path(__file__).resolve().parents[2],
        "other": pathlib.Path(other).resolve(),
    }
    file = "tests/benchmarks/train_speed.py"
    commands = {
        name: [sys.executable, str(root / file), "--serve", "pangu_tiny"]
        for name, root in roots.items()
    }
    environments = {name: {"PYTHONPATH": str(root)} for name, root in roots.items()}
    seconds = take_turns(commands, rounds, steps, **environments)
    show(seconds)
    draw = random.Random(0)
    ratios = []
    for _ in range(2000):
        drawn = draw.choices(range(rounds), k=rounds)
        this, other = ([seconds[name][i] for i in drawn] for name in ("this", "other"))
        ratios.append(median(other) / median(this))
    cuts = statistics.quantiles(ratios, n=40)
    print(
        f"speed of this checkout to {roots['other']}: "
        f"{median(seconds['other']) / median(seconds['this']):.3f}, {cuts[0]:.3f} to {cuts[-1]:.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--against", metavar="CHECKOUT")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    elif options.against:
        compare_checkouts(options.against, options.rounds, options.steps)
    else:
        compare(options.torch_python, options.rounds, options.steps)
