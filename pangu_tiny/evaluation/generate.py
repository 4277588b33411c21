"""The stage `generate`: text from a checkpoint, token by token."""

from typing import Any

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.errors import UserError, check_number, failing_as
from pangu_tiny.evaluation.sampling import check_sampling, sample
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.tokenizer_json import TokenizerJson
from pangu_tiny.topology import processes
from pangu_tiny.workdir import claim, write_atomically


def generate(
    checkpoint: str,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    workdir: str | None = None,
) -> str:
    """Continues a prompt and prints the text as it comes.

    Args:
      checkpoint: a train workdir or a step in it.
      prompt: text to continue; may be empty.
      tokens: how many to add at most; an end mark ends earlier.
      temperature: 0 takes the likeliest token, 1 the model's distribution.
      top_k: draw among the k likeliest; 0 is all.
      top_p: draw among the fewest tokens that have this probability together; 1 is all.
      seed: of the draws.
      workdir: where `generated.txt` goes; None only prints.
    """
    if processes.several():
        raise UserError(f"generate runs in one process, found {processes.count()}")
    check_number("generate.tokens", tokens, 0)
    check_number("generate.seed", seed, 0, 2**32 - 1)
    check_sampling(temperature, top_k, top_p)
    opened = open_checkpoint(checkpoint)
    tokenizer = opened.tokenizer()
    begin_id, end_id = opened.about["begin_id"], opened.about["end_id"]
    begin = [] if begin_id is None else [begin_id]
    ids = begin + _encode(tokenizer, prompt, opened)
    if not ids:
        raise UserError(
            f"generate.prompt is empty and checkpoint {opened.path} has no begin mark: expected"
            " some text"
        )
    longest = opened.about["sequence_length"]
    if len(ids) + tokens > longest:
        raise UserError(
            f"generate.prompt has {len(ids)} tokens and generate.tokens is {tokens}: the model "
            f"was trained on sequences of {longest}"
        )
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if workdir is not None:
        source = {"checkpoint": opened.about["identity"], "step": opened.about["step"]}
        asked = {"prompt": prompt, "tokens": tokens, **settings}
        folder = claim(workdir, "generate", source | asked)
    decoder = Decoder(opened.shape)
    drawn = sample(
        decoder,
        opened.params(),
        ids,
        tokens,
        **settings,
        end_id=end_id,
        vocab_size=min(tokenizer.vocab_size, opened.shape.vocab_size),
    )
    # The prompt as it was given, and as it decodes, which differ where a normaliser changed it.
    text, shown = prompt, tokenizer.decode(ids[len(begin) :])
    print(prompt, end="", flush=True)
    for token in drawn:
        ids.append(token)
        longer = tokenizer.decode(ids[len(begin) :])
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of a character still come
            print(longer[len(shown) :], end="", flush=True)
            text, shown = text + longer[len(shown) :], longer
    print()
    if workdir is not None:
        write_atomically(folder / "generated.txt", text)
    return text


def _encode(tokenizer: Tokenizer | TokenizerJson, prompt: str, opened: Checkpoint) -> list[int]:
    with failing_as(f"generate.prompt {prompt!r} is not text", UnicodeEncodeError):
        prompt.encode()
    ids = tokenizer.encode(prompt)
    rows = opened.shape.vocab_size
    if (largest := max(ids, default=0)) >= rows:
        raise UserError(
            f"checkpoint {opened.path} has {rows:,} ids, but its tokenizer makes id {largest:,} of"
            " generate.prompt: it is another model's, expected its own"
        )
    return ids
