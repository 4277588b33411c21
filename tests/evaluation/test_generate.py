"""The stage generate: what is printed when, where texts end, and what is refused."""

import dataclasses
import functools
import io
import itertools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from checkpoint_files import write_checkpoint
from shapes import TINY, random_params

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation import generate as stage
from pangu_tiny.evaluation.decoding import sample
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.vocabulary import huggingface

generate = functools.partial(stage.generate, hardware=Hardware())


def train_sentencepiece(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc fi bca cab " * 3] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=270,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return Tokenizer(model.getvalue())


def parrot(ids):
    """A shape and parameters that follow each of `ids` by the next one, whatever came before.

    The blocks add nothing; the head reads in the current token's own vector which one is next.
    Vectors are random and so nearly orthogonal: 256 wide, they overlap by 1/16.
    """
    shape = ModelShape(depth=1, width=256, heads=1, head_dim=2, ffn_width=1, vocab_size=300)
    params = jax.tree.map(np.zeros_like, random_params(shape))
    table = np.random.default_rng(0).normal(size=(shape.padded_vocab, shape.width))
    params["embedding"]["table"] = table.astype(np.float32)
    params["final_norm"]["scale"] = np.ones(shape.width, np.float32)
    for token, following in itertools.pairwise(ids):
        params["head"]["kernel"][:, following] = table[token]
    return shape, params


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A checkpoint that continues "a" by "éb中", in bytes where a character is no piece, and
    then ends."""
    tokenizer = train_sentencepiece(normalization_rule_name="identity", add_dummy_prefix=False)
    ids = [*tokenizer.encode("aéb中"), tokenizer.end_id]
    assert len(ids) == len(set(ids)) == 1 + 2 + 1 + 3 + 1
    folder = tmp_path_factory.mktemp("speaking")
    return write_checkpoint(folder, *parrot(ids), tokenizer, sequence_length=32)


class Terminal(io.StringIO):
    """Keeps what was written and flushed, piece by piece."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def flush(self):
        self.shown.append(self.getvalue()[sum(map(len, self.shown)) :])


def test_text_is_printed_as_it_comes_in_whole_characters(speaking, monkeypatch):
    """Printed byte by byte, é would be two replacement characters; printed at the end, there
    would be one piece."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    text = generate(speaking, prompt="a", tokens=20, temperature=0.0)
    assert terminal.shown == ["a", "é", "b", "中", "\n"]
    assert terminal.getvalue() == "aéb中\n" and text == "aéb中"


def byte_level(*added):
    """A tokenizer.json of the kind that LLaMA-3 has: all bytes, then what is added."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(added))
    return made


def write_whole(folder, made, ids, begin_id, end_id):
    """A checkpoint whose tokenizer is a tokenizer.json, and which follows each of `ids` by the
    next."""
    made.enable_truncation(2)  # as it is saved by those who shortened texts with it
    content = made.to_str().encode()
    tokenizer = SimpleNamespace(digest="w", model_bytes=content, begin_id=begin_id, end_id=end_id)
    return write_checkpoint(folder, *parrot(ids), tokenizer, sequence_length=32)


def test_through_a_tokenizer_json(tmp_path, monkeypatch):
    """As through SentencePiece: in whole characters, up to the end mark of the checkpoint; marks
    in the prompt are marks."""
    made = byte_level("<end>", *(f"<{n}>" for n in range(257, 302)))
    end = made.token_to_id("<end>")
    ids = [*made.encode("aéb中").ids, end, *made.encode("k<301>").ids]
    checkpoint = write_whole(tmp_path, made, ids, begin_id=None, end_id=end)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert generate(checkpoint, prompt="<299>bxa", tokens=20, temperature=0.0) == "<299>bxaéb中"
    assert terminal.shown == ["<299>bxa", "é", "b", "中", "\n"]
    assert generate(checkpoint, prompt="xa", tokens=2, temperature=0.0) == "xaé"
    # Ids that the model does not have are never drawn: "<301>" would be no text.
    assert generate(checkpoint, prompt="k", tokens=1, temperature=0.0) != "k"
    for prompt, said in (
        ("<300>", r"checkpoint .* has 300 ids, but its tokenizer makes id 300 of generate.prompt"),
        ("", "generate.prompt is empty and checkpoint .* has no begin mark"),
        ("\udcff", r"generate.prompt '\\udcff' is not text"),
    ):
        with pytest.raises(UserError, match=said):
            generate(checkpoint, prompt=prompt, tokens=1)


def test_byte_fallback_in_a_tokenizer_json(tmp_path, monkeypatch):
    """What import-hf stores of a LLaMA-2 whose vocabulary is left whole."""
    tokenizer = train_sentencepiece(
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False
    )
    made = tokenizers.Tokenizer.from_str(huggingface.export(tokenizer)["tokenizer.json"])
    ids = [*tokenizer.encode("aéb中"), tokenizer.end_id]
    checkpoint = write_whole(tmp_path, made, ids, tokenizer.begin_id, tokenizer.end_id)
    assert open_checkpoint(checkpoint).tokenizer().encode("aé") == tokenizer.encode("aé")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert generate(checkpoint, prompt="a", tokens=20, temperature=0.0) == "aéb中"
    assert terminal.shown == ["a", "é", "b", "中", "\n"]


def test_a_character_that_is_never_finished_is_left_out(speaking, capsys):
    assert generate(speaking, prompt="a", tokens=5, temperature=0.0) == "aéb"
    assert capsys.readouterr().out == "aéb\n"


def test_a_prompt_that_the_tokenizer_changes_is_kept_as_it_was_given(tmp_path, capsys):
    """NFKC makes two letters of the ligature, which moves everything behind it."""
    tokenizer = train_sentencepiece(normalization_rule_name="nfkc")
    prompt = "b\ufb01"
    assert tokenizer.decode(tokenizer.encode(prompt)) == "bfi"
    (last, following) = (tokenizer.encode(prompt)[-1], tokenizer.encode("a")[-1])
    shape, params = parrot([last, following, tokenizer.end_id])
    checkpoint = write_checkpoint(tmp_path, shape, params, tokenizer, sequence_length=32)
    text = generate(checkpoint, prompt=prompt, tokens=9, temperature=0.0)
    assert text.replace(" ", "") == prompt + "a"
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(("tokens", "fits"), [(30, True), (31, False), (-1, False)])
def test_more_tokens_than_the_model_has_seen_are_refused(speaking, tokens, fits):
    """The begin mark and "a" take 2 of 32."""
    if fits:
        assert generate(speaking, prompt="a", tokens=tokens, temperature=0.0) == "aéb中"
        return
    with pytest.raises(UserError, match=f"generate.tokens is {tokens}"):
        generate(speaking, prompt="a", tokens=tokens)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(UserError, match=rf"generate.seed is {seed}, expected at least 0"):
        generate("nowhere", seed=seed)


def test_no_tokens_is_the_prompt(speaking):
    assert generate(speaking, prompt="a", tokens=0) == "a"


def test_a_workdir_keeps_the_text_and_refuses_another(speaking, tmp_path):
    folder = tmp_path / "text"
    text = generate(speaking, tokens=3, temperature=0.0, workdir=str(folder))
    assert (folder / "generated.txt").read_text() == text
    generate(speaking, tokens=3, temperature=0.0, workdir=str(folder))
    with pytest.raises(UserError, match="tokens is 3 there, 2 here"):
        generate(speaking, tokens=2, temperature=0.0, workdir=str(folder))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        generate(str(tmp_path))


def test_sampling_runs_in_bfloat16():
    shape = dataclasses.replace(TINY, depth=1)
    drawn = list(sample(Decoder(shape, jnp.bfloat16), by_layer(random_params(shape)), [1, 2], 4))
    assert len(drawn) == 4


def of_many(capsys):
    """What was printed, line by line."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_many_prompts_give_lines_in_their_order(speaking, batch_size, tmp_path, capsys):
    """However they are batched; the last batch is filled up and its filling left out."""
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("aé\r\n\na\naéb\n")
    settings = {"prompts": str(file), "temperature": 0.0, "batch_size": batch_size}
    generate(speaking, tokens=20, workdir=str(folder), log_probabilities=True, **settings)
    found = of_many(capsys)
    assert [(one["prompt"], one["text"]) for one in found] == [
        ("aé", "b中"), ("a", "éb中"), ("aéb", "中")
    ]  # fmt: skip
    assert [one["tokens"] for one in found] == [4, 6, 3]
    assert {one["finish"] for one in found} == {"end"}
    assert all(len(one["log_probabilities"]) == one["tokens"] for one in found)
    written = (folder / "generated.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == found


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "finish"),
    [
        (["中"], 20, "éb", "stop"),
        (["b中", "x"], 20, "é", "stop"),
        (["中b"], 20, "éb中", "end"),
        (None, 3, "éb", "length"),
    ],
)
def test_where_a_continuation_ends(speaking, monkeypatch, capsys, stop, tokens, text, finish):
    """Also when it is streamed: what may be the beginning of a stop string is held back."""
    asked = '{"prompt": "a", "id": 3}\n"a"\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(asked.encode())))
    settings = {"temperature": 0.0, "tokens": tokens, "stop": stop}
    generate(speaking, prompts="-", **settings)
    for found in of_many(capsys):
        assert (found["text"], found["finish"]) == (text, finish)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert generate(speaking, prompt="a", **settings) == "a" + text
    assert "".join(terminal.shown).rstrip("\n") == "a" + text


def test_the_beginning_of_long_prompts_is_left_out_if_asked(speaking, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"\n"a"\n')
    settings = {"prompts": str(file), "tokens": 10, "temperature": 0.0}
    with pytest.raises(UserError, match=r"generate.prompts 'a+' has \d+ tokens and generate.tok"):
        generate(speaking, **settings)
    capsys.readouterr()
    generate(speaking, cut_prompts=True, **settings)
    told = capsys.readouterr()
    assert "the beginning of 1 of 2 prompts was left out, to fit" in told.err
    assert [json.loads(line)["text"] for line in told.out.splitlines()] == ["éb中", "éb中"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"\xff\xfe", "cannot be read as text"),
        ("a.txt", b" \n\n", "holds no prompt, expected one a line"),
        ("a.jsonl", b'"a"\n{"text": "b"}\n', r'line 2 has no "prompt" of text'),
        ("a.jsonl", b'"a"\nb\n', "line 2 is not JSON"),
        ("absent.txt", None, "cannot be read as text"),
    ],
)
def test_files_of_prompts_that_are_none(speaking, tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        generate(speaking, prompts=str(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stop": ["x", ""]}, "generate.stop holds an empty text"),
        ({"dtype": "float16"}, "generate.dtype is 'float16', expected one of float32, bfloat16"),
        ({"batch_size": 0}, "generate.batch_size is 0"),
        ({"log_probabilities": True}, "are written for generate.prompts alone"),
    ],
)
def test_settings_that_are_none(speaking, settings, named):
    with pytest.raises(UserError, match=named):
        generate(speaking, prompt="a", **settings)
