"""export-gguf: the file says what the checkpoint says, and llama.cpp tells its story."""

import dataclasses
import json

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import write_checkpoint
from shapes import TINY, random_params

from pangu_tiny import cli
from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert.export_gguf import _overlap, export_gguf
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.decoding import sample
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer

PLAIN = dataclasses.replace(TINY, series_terms=1, shortcut_ratio=0)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    def write(shape, tokenizer=tokenizer, more=0):
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size + more)
        return write_checkpoint(tmp_path / "run", shape, random_params(shape), tokenizer, 64)

    return write


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_holds_the_checkpoint(dtype, checkpoint, tmp_path, tokenizer):
    """Rows of queries and keys in pairs, neither padding nor another order of heads."""
    source = checkpoint(dataclasses.replace(PLAIN, tied=True))
    reader = gguf.GGUFReader(export_gguf(source, str(tmp_path / "out"), dtype=dtype))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    params, shape = open_checkpoint(source).params(), open_checkpoint(source).shape

    def read(name):
        data = stored[name].data
        return data.view(ml_dtypes.bfloat16) if stored[name].data.dtype == np.uint8 else data

    kind = np.dtype(dtype)
    table = np.asarray(params["embedding"]["table"])[: tokenizer.vocab_size]
    np.testing.assert_array_equal(read("token_embd.weight"), table.astype(kind))
    assert "output.weight" not in stored  # tied
    for name, heads in (("query", shape.heads), ("key", shape.kv_heads)):
        found = read(f"blk.1.attn_{name[0]}.weight").reshape(heads, shape.head_dim, shape.width)
        wanted = np.asarray(params["blocks"]["attention"][name])[1].astype(kind)
        half = shape.head_dim // 2
        for i in range(half):
            np.testing.assert_array_equal(found[:, 2 * i], wanted[:, :, i].T)
            np.testing.assert_array_equal(found[:, 2 * i + 1], wanted[:, :, i + half].T)
    down = np.asarray(params["blocks"]["ffn"]["down"])[2].T.astype(kind)
    np.testing.assert_array_equal(read("blk.2.ffn_down.weight"), down)
    norm = stored["output_norm.weight"].data
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, params["final_norm"]["scale"])

    def field(name):
        return reader.fields[name].contents()

    assert field("llama.attention.key_length") == shape.head_dim != shape.width / shape.heads
    assert field("llama.attention.head_count_kv") == shape.kv_heads
    assert field("llama.context_length") == 64
    assert field("tokenizer.ggml.tokens") == [tokenizer.piece(i) for i in range(tokenizer.pieces)]
    assert field("tokenizer.ggml.bos_token_id") == tokenizer.begin_id
    assert field("tokenizer.ggml.add_space_prefix") is False


def test_rows_that_no_piece_goes_with_are_named(checkpoint, tmp_path, tokenizer):
    """llama.cpp takes as many rows as there are names."""
    reader = gguf.GGUFReader(export_gguf(checkpoint(PLAIN, more=5), str(tmp_path / "out")))
    names = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(names) == tokenizer.pieces + 5 == reader.tensors[0].shape[1]
    assert reader.fields["tokenizer.ggml.token_type"].contents()[-5:] == [proto.UNUSED] * 5


def test_modules_are_refused_with_advice(checkpoint, tmp_path, capsys):
    flags = {"checkpoint": checkpoint(TINY), "workdir": tmp_path / "out"}
    argv = [f"--gin.export_gguf.{name}={value}" for name, value in flags.items()]
    assert cli.main(["export-gguf", *argv]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "which llama.cpp does not compute: for it, train with ModelShape.series_terms" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "pieces", "rules", "reason"),
    [
        (proto.UNUSED, ["<x>"], {}, "it has unused pieces"),
        (proto.USER_DEFINED, ["<x>"], {"add_dummy_prefix": True}, "would put another"),
        (proto.USER_DEFINED, ["<\u2581x>"], {}, "holds a space"),
        (proto.USER_DEFINED, ["<a>", "><b>"], {}, "user-defined pieces overlap"),
    ],
)
def test_a_tokenizer_that_differs_there_is_refused(
    kind, pieces, rules, reason, tokenizer, checkpoint, tmp_path
):
    model = type(tokenizer.proto).FromString(tokenizer.model_bytes)
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for name, value in rules.items():
        setattr(model.normalizer_spec, name, value)
    source = checkpoint(PLAIN, Tokenizer(model.SerializeToString()))
    with pytest.raises(UserError, match=reason):
        export_gguf(source, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("pieces", "overlap"),
    [
        (["<a>", "<b>", "<a><b>"], False),
        (["<abc>", ">x"], False),  # the longest is the first in a text too
        (["ab", "bc"], True),
        (["ab", "bcd"], True),
        (["aba"], False),  # with itself alone: both take the first
    ],
)
def test_pieces_that_overlap(pieces, overlap):
    assert _overlap(pieces) == overlap


@pytest.mark.parity
def test_llama_cpp_tells_the_story_of_a_trained_model(real_data, tmp_path):
    import xllamacpp

    source = real_data / "checkpoints" / "stories260k"
    golden = json.loads((source / "golden.json").read_text())
    run = import_hf(str(source), str(tmp_path / "run"))
    params = xllamacpp.CommonParams()
    params.model.path = export_gguf(run, str(tmp_path / "out"))
    params.n_ctx, params.warmup = 512, False
    server, opened = xllamacpp.Server(params), open_checkpoint(run)
    count = len(golden["greedy_ids"]) - len(golden["prompt_ids"])

    def told(prompt, count):
        asked = {"prompt": prompt, "max_tokens": count, "temperature": 0.0, "ignore_eos": True}
        (choice,) = server.handle_completions(asked)["choices"]
        return choice["text"].strip()

    assert told(golden["prompt_ids"], count) == golden["greedy_text"].strip()
    # Its own tokenizer: a begin mark or a space too many makes another story.
    tokenizer, prompt = opened.tokenizer(), "Tom had 3 größe dogs. He"
    ids = [opened.about["begin_id"], *tokenizer.encode(prompt)]
    drawn = [*sample(Decoder(opened.shape), by_layer(opened.params()), ids, 60)]
    whole = tokenizer.decode(ids[1:] + drawn)
    assert told(prompt, 60) == whole.removeprefix(prompt).strip()
