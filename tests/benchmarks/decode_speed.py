"""Greedy decoding of a 20M LLaMA shape, this project's and transformers' taking turns, both with a
cache of fixed size.

python tests/benchmarks/decode_speed.py [--torch_python=PYTHON] [--batch=1] [--new=128]
    [--dtype=float32] [--rounds=5] [--steps=2] [--gin_file=hardware/cpu.gin]

transformers' is taken as its `generate` runs it with a static cache (on a GPU it then compiles the
forward pass by itself), and on a CPU also with the forward pass under torch.compile. Prompts have
2 tokens. What is compiled is compiled before the time is taken, and said. Needs torch and
transformers (`pip install '.[parity]'`), in this environment or in that of --torch_python.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import train_speed
from train_speed import SHAPE, median, take_turns

PROMPT = 2


def make_pangu_tiny(options: argparse.Namespace) -> Callable[[], None]:
    import jax
    import numpy as np

    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        from pangu_tiny.topology.host import keep_freed_memory

        keep_freed_memory()

    from pangu_tiny import config
    from pangu_tiny.data.rows import Marks
    from pangu_tiny.evaluation.decoding import continuations
    from pangu_tiny.model.cached import by_layer
    from pangu_tiny.model.decoder import init_params, parameter_shapes
    from pangu_tiny.model.shape import ModelShape
    from pangu_tiny.program.build import build
    from pangu_tiny.topology.hardware import Hardware

    hardware = config.build(Hardware, options.gin_file)
    shape = ModelShape(**SHAPE)
    program = build(shape, hardware, Marks(1, 2), options.dtype)
    decoder = program.objective.decoder
    params = jax.tree.map(
        lambda leaf, target: leaf.astype(target.dtype),
        init_params(shape, "constant", jax.random.key(0)),
        parameter_shapes(shape, decoder.dtype),
    )
    params = by_layer(jax.device_put(params, program.param_shardings))
    random = np.random.default_rng(0)
    prompts = random.integers(3, shape.vocab_size, (options.batch, PROMPT)).tolist()

    def run() -> None:
        with jax.set_mesh(program.mesh):
            for _ in continuations(decoder, params, prompts, options.new, stretch=16):
                pass

    return run


def llama_config(**marks: int | None) -> Any:
    """The shape as transformers has it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["width"],
        intermediate_size=SHAPE["ffn_width"],
        num_hidden_layers=SHAPE["depth"],
        num_attention_heads=SHAPE["heads"],
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        **marks,
    )


def make_transformers(options: argparse.Namespace, compiled: bool) -> Callable[[], None]:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(train_speed.cores())
    torch.manual_seed(0)
    config = llama_config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(config).eval().to(options.device, getattr(torch, options.dtype))
    if compiled:
        model.forward = torch.compile(model.forward)
    tokens = torch.randint(3, SHAPE["vocab_size"], (options.batch, PROMPT), device=options.device)
    generate = functools.partial(
        model.generate,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=options.new,
        do_sample=False,
        cache_implementation="static",
    )

    def run() -> None:
        with torch.inference_mode():
            found = generate(tokens)
        assert found.shape == (options.batch, PROMPT + options.new)
        found.tolist()

    return run


def serve(options: argparse.Namespace) -> None:
    if options.serve == "pangu_tiny":
        run = make_pangu_tiny(options)
    else:
        run = make_transformers(options, "compiled" in options.serve)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    start = time.perf_counter()
    run()
    usual = time.perf_counter() - start
    print(f"{options.serve}: compiled in about {first - usual:.1f} s", file=sys.stderr)
    train_speed.answer(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gin_file", default="hardware/cpu.gin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    names = ["pangu_tiny", "transformers"]
    names += ["transformers, compiled"] if options.device == "cpu" else []
    kept = [argument for argument in sys.argv[1:] if "torch_python" not in argument]
    commands = {
        name: [
            sys.executable if name == "pangu_tiny" else options.torch_python,
            __file__,
            *kept,
            "--serve",
            name,
        ]
        for name in names
    }
    seconds = take_turns(commands, options.rounds, options.steps)
    train_speed.show(seconds, options.batch * options.new)
    fastest = min(median(seconds[name]) for name in names[1:])
    print(f"ratio to the faster: {fastest / median(seconds['pangu_tiny']):.2f}")


if __name__ == "__main__":
    main()
