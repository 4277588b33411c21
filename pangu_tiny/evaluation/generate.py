"""The stage `generate`: text from a checkpoint, of one prompt as it comes or of many in batches."""

import json
import sys
from collections.abc import Sequence

import jax

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import UserError, check_number, check_one_of, failing_as
from pangu_tiny.evaluation.continuation import Asked, Continuation, Drawing
from pangu_tiny.evaluation.prompts import read_prompts
from pangu_tiny.evaluation.sampling import Sampling
from pangu_tiny.model.cached import by_layer
from pangu_tiny.program.build import DTYPES, build
from pangu_tiny.progress import Progress
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import alone, first, from_first
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.workdir import digest_of, write_atomically

_STRETCH = 16  # tokens of a batch that are drawn between two looks at them


def generate(
    checkpoint: str,
    hardware: Hardware,
    prompt: str = "",
    prompts: str | None = None,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: list[str] | None = None,
    log_probabilities: bool = False,
    cut_prompts: bool = False,
    batch_size: int = 16,
    dtype: str = "float32",
    workdir: str | None = None,
) -> str:
    """Continues a prompt and prints the text as it comes; or many, each result a line of JSON.

    A line has `prompt`, `text` (what follows), `tokens`, and `finish`: "end" for an end mark,
    "stop" for a stop string, "length" for as many tokens as were asked for.

    Args:
      checkpoint: a train workdir or a step in it.
      hardware: how it is laid out; `fsdp` and `data` cut the batch, `tensor` does not.
      prompt: text to continue; may be empty.
      prompts: a file of prompts, one a line; in a .jsonl a string or an object with "prompt" on
        each; "-" is standard input.
      tokens: how many to add at most; an end mark ends earlier.
      temperature: 0 takes the likeliest token, 1 the model's distribution.
      top_k: draw among the k likeliest; 0 is all.
      top_p: draw among the fewest tokens that have this probability together; 1 is all.
      seed: of the draws; those of a prompt depend on its place in the file, not on `batch_size`.
      stop: texts before which a continuation ends.
      log_probabilities: adds to every line those of its tokens, by the model alone.
      cut_prompts: leaves out the beginning of prompts that are too long, and says of how many;
        otherwise they are refused.
      batch_size: prompts that are continued at once.
      dtype: "float32" or "bfloat16", of matrices and activations.
      workdir: where `generated.txt`, or `generated.jsonl` of many, goes; None only prints.
    """
    check_number("generate.tokens", tokens, 0)
    check_number("generate.seed", seed, 0, 2**32 - 1)
    check_number("generate.batch_size", batch_size, 1)
    check_one_of("generate.dtype", dtype, DTYPES)
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    if "" in (stop or []):
        raise UserError("generate.stop holds an empty text, which every text ends with")
    if prompts is not None and prompt:
        raise UserError("generate.prompt and generate.prompts are bound, expected one of them")
    if prompts is None and log_probabilities:
        raise UserError("generate.log_probabilities are written for generate.prompts alone")
    opened = open_checkpoint(checkpoint)
    given = [prompt] if prompts is None else from_first(lambda: read_prompts(prompts))
    asked = _encoded(opened, given, tokens, cut_prompts, "generate.prompt" + "s" * bool(prompts))
    settings = {**sampling._asdict(), "seed": seed}
    if workdir is not None:
        source = {"checkpoint": opened.about["identity"], "step": opened.about["step"]}
        named = {"prompt": prompt} if prompts is None else {"prompts": digest_of(given)}
        more = {"stop": stop, "dtype": dtype, "log_probabilities": log_probabilities}
        folder = claim_together(
            workdir, "generate", {**source, **named, "tokens": tokens, **settings, **more}
        )
    program = build(opened.shape, hardware, Marks(0, 0), dtype)
    with jax.set_mesh(program.mesh):
        params = by_layer(opened.params(program.param_shardings, program.objective.decoder.dtype))
        drawing = Drawing(opened, program, params, sampling, seed, tokens, stop or [])
        if prompts is None:
            text, name = _stream(drawing, asked[0]), "generated.txt"
        else:
            ended = _in_batches(drawing, asked, batch_size)
            lines = [json.dumps(one.told(log_probabilities), ensure_ascii=False) for one in ended]
            text, name = "\n".join(lines) + "\n", "generated.jsonl"
            _show(text)
    with alone() as leads:
        if leads and workdir is not None:
            write_atomically(folder / name, text)
    return text


def _encoded(
    opened: Checkpoint, prompts: Sequence[str], tokens: int, cut: bool, name: str
) -> list[Asked]:
    """The prompts in ids that the model has, each with room for what is asked."""
    tokenizer, begin_id = opened.tokenizer(), opened.about["begin_id"]
    begin = [] if begin_id is None else [begin_id]
    longest, rows, cut_off = opened.about["sequence_length"], opened.shape.vocab_size, 0
    found = []
    for prompt in prompts:
        with failing_as(f"{name} {prompt!r} is not text", UnicodeEncodeError):
            prompt.encode()
        ids = tokenizer.encode(prompt)
        if (largest := max(ids, default=0)) >= rows:
            raise UserError(
                f"checkpoint {opened.path} has {rows:,} ids, but its tokenizer makes id"
                f" {largest:,} of {name}: it is another model's, expected its own"
            )
        if not begin + ids:
            raise UserError(
                f"{name} is empty and checkpoint {opened.path} has no begin mark: expected some"
                " text"
            )
        room = longest - len(begin) - tokens
        if len(ids) > room:
            if not cut or room < 1:
                raise UserError(
                    f"{name} {_short(prompt)} has {len(begin + ids)} tokens and generate.tokens is"
                    f" {tokens}: the model was trained on sequences of {longest}"
                )
            ids, cut_off = ids[-room:], cut_off + 1
        found.append(Asked(prompt, begin + ids, len(begin)))
    if cut_off and first():
        said = f"the beginning of {cut_off:,} of {len(found):,} prompts was left out, to fit"
        print(said, file=sys.stderr)
    return found


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:40] + "…")


def _show(text: str) -> None:
    if first():
        print(text, end="", flush=True)


def _stream(drawing: Drawing, asked: Asked) -> str:
    _show(asked.prompt)
    shown = 0
    one = Continuation(asked, drawing)
    for (one,) in drawing.draw([asked], [0], stretch=1):
        sure = len(one.text) - one.held_back
        if sure > shown:
            _show(one.text[shown:sure])
            shown = sure
    _show(one.text[shown:] + "\n")
    return asked.prompt + one.text


def _in_batches(drawing: Drawing, asked: Sequence[Asked], batch_size: int) -> list[Continuation]:
    """In the order of the prompts; those of a batch are of about one length, and the last batch is
    filled up, so that it needs no program of its own."""
    order = sorted(range(len(asked)), key=lambda number: len(asked[number].ids))
    found: dict[int, Continuation] = {}
    with Progress("generate", len(asked), "prompt", shown=first()) as progress:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            filled = numbers + numbers[-1:] * (min(batch_size, len(order)) - len(numbers))
            *_, ended = drawing.draw([asked[i] for i in filled], filled, _STRETCH)
            found |= dict(zip(numbers, ended, strict=False))
            progress.update(len(numbers))
    return [found[number] for number in range(len(asked))]
