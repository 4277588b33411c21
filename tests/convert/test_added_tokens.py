"""Which rows of the embedding are kept, and what is said of the others."""

import json

import numpy as np
import pytest
from hf_models import CONFIG, EMBEDDING, HEAD, SHAPE, draw

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert.added_tokens import added_tokens
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.errors import UserError

TIKTOKEN = b"IQ== 0\nIg== 1\n"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"
CHAT = {"<|im_start|>": 300, "<|im_end|>": 301}


@pytest.fixture
def put(folder):
    """Writes a JSON file into the model's folder."""

    def put(name, content):
        (folder / name).write_text(json.dumps(content))

    return put


def test_padded_rows_are_named(write, workdir, capsys):
    """Those above the ids are left out, whatever they hold; those below are kept."""
    weights = draw()
    weights[EMBEDDING][300:] = np.nan
    weights[EMBEDDING][[3, 5, 6]] = 0
    import_hf(write(weights=weights), workdir)
    said = capsys.readouterr().out
    assert "rows 300-309 left out, padding" in said
    found = open_checkpoint(workdir).params()["embedding"]["table"][:300]
    np.testing.assert_array_equal(found, weights[EMBEDDING][:300])


def test_nothing_is_said_of_a_full_embedding(write, workdir, capsys):
    cut = {name: x[:300] if name in (EMBEDDING, HEAD) else x for name, x in draw().items()}
    import_hf(write(CONFIG | {"vocab_size": 300}, cut), workdir)
    assert "row" not in capsys.readouterr().out


def test_added_tokens_that_are_left_out_are_named(write, put, workdir, capsys):
    """Listed in three files, which are read together; below the tokenizer's ids all stay."""
    rows = {
        name: np.resize(x, (340, 32)) for name, x in draw().items() if name in (EMBEDDING, HEAD)
    }
    source = write(CONFIG | {"vocab_size": 340}, draw() | rows)
    put("added_tokens.json", CHAT)
    put("tokenizer_config.json", {"added_tokens_decoder": {"302": {"content": "a\nb"}}})
    listed = {2: "</s>"} | {i: f"<{i}>" for i in range(310, 330)}
    put("tokenizer.json", {"added_tokens": [{"id": i, "content": x} for i, x in listed.items()]})
    import_hf(source, workdir)
    said = capsys.readouterr().out
    first = "rows 300-302, 310-329 left out: <|im_start|>, <|im_end|>, 'a\\nb', <310>, "
    assert first in said and "<326> and 3 more\n" in said
    assert "rows 303-309, 330-339 left out, padding above the tokenizer's ids\n" in said


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"eos_token_id": 301}, r"eos_token_id is 301 \(<\|im_end\|>\), .* set eos_token_id to 2"),
        ({"eos_token_id": [2, 301]}, r"eos_token_id is 301 .*whole_vocabulary = True keeps"),
        ({"eos_token_id": 305}, "eos_token_id is 305, and rows above the tokenizer's 300 ids are"),
        ({"bos_token_id": 300}, r"bos_token_id is 300 \(<\|im_start\|>\), .*bos_token_id to 1,"),
    ],
    ids=str,
)
def test_marks_that_are_left_out_are_refused(write, put, refused, settings, match):
    write(CONFIG | settings)
    put("added_tokens.json", CHAT)
    refused(rf"config.json: {match}")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("added_tokens.json", b"[]", "added_tokens.json holds a list, expected a JSON object"),
        ("added_tokens.json", b'{"a": "b"}', "added tokens cannot be read, expected ids and texts"),
        ("added_tokens.json", b'{"a": [1]}', "added tokens cannot be read"),
        ("added_tokens.json", b'{"a": Infinity}', "added tokens cannot be read"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added tokens cannot be read"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": {}}}', "cannot be read"),
        ("tokenizer.json", b'{"added_tokens": {"a": 1}}', "added tokens cannot be read"),
        ("tokenizer.json", b'{"added_tokens": [{"id": null, "content": ""}]}', "cannot be read"),
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("tokenizer.json", LFS_POINTER, "tokenizer.json is a git-lfs pointer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_lists_of_added_tokens_that_are_damaged(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        added_tokens(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_whole_vocabulary(write, workdir, folder, capsys):
    """All rows and the bytes of tokenizer.json; marks are those of the config."""
    weights = draw()
    weights[EMBEDDING][305:] = 0
    write(weights=weights, tokenizer_bytes=TIKTOKEN)
    (folder / "tokenizer.json").write_bytes(b"{}")
    import_hf(str(folder), workdir, whole_vocabulary=True)
    opened = open_checkpoint(workdir)
    assert opened.shape == SHAPE and opened.tokenizer_bytes == b"{}"
    assert (opened.about["begin_id"], opened.about["end_id"]) == (7, 8)
    found = opened.params()["embedding"]["table"][:310]
    np.testing.assert_array_equal(found, weights[EMBEDDING])
    said = capsys.readouterr().out
    assert "next: generate" in said and "left out" not in said


def test_tokenizers_that_do_not_fit(write, folder, refused, tokenizer):
    """The way out is named only where there is no SentencePiece model to be mended."""
    file, beside = folder / "tokenizer.model", folder / "tokenizer.json"
    no_way_out = "(?!.*whole_vocabulary)"
    write(tokenizer_bytes=b"")
    refused(rf"{no_way_out}.*tokenizer.model is empty, expected a SentencePiece model$")
    write(tokenizer_bytes=tokenizer.model_bytes[:-3])
    refused(rf"{no_way_out}.*tokenizer.model is not a SentencePiece model \(SentencePiece: INTERN")
    write(tokenizer_bytes=LFS_POINTER)
    refused(rf"{no_way_out}.*tokenizer.model is a git-lfs pointer, not the file itself")
    way_out = r"LLaMA-3\), import_hf.whole_vocabulary = True"
    write(tokenizer_bytes=TIKTOKEN)
    refused(f"tokenizer.model is of tiktoken, .*{way_out}")
    file.unlink()
    refused(rf"{no_way_out}.*tokenizer.model does not exist, expected a SentencePiece model file$")
    refused("tokenizer.json does not exist", whole_vocabulary=True)
    beside.write_bytes(b"")
    refused(f"tokenizer.json is there, but no tokenizer.model, .*{way_out}")
    refused(f"{no_way_out}.*nowhere does not exist", tokenizer="nowhere")
    refused("tokenizer.json is empty, expected one to store", whole_vocabulary=True)
    beside.write_bytes(LFS_POINTER)
    refused("tokenizer.json is a git-lfs pointer", whole_vocabulary=True)
    cut = {name: x[:299] if name in (EMBEDDING, HEAD) else x for name, x in draw().items()}
    write(CONFIG | {"vocab_size": 299}, cut)
    refused(f"has 300 ids, but {EMBEDDING} in .* has 299 rows")
