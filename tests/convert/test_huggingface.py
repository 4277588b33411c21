"""import-hf: what comes in is what lies there, number by number, or nothing does."""

import dataclasses
import json
import shutil
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_weights import to_params
from safetensors.numpy import save_file

from pangu_tiny import cli
from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert import huggingface
from pangu_tiny.convert.huggingface import import_hf
from pangu_tiny.convert.llama import read_config, tensors
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder, logits
from pangu_tiny.model.shape import ModelShape

ROWS = 310  # of the embedding; the tokenizer has 300 ids
SHAPE = ModelShape(
    depth=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn_width=40,
    vocab_size=ROWS,
    rope_theta=500.0,
    norm_eps=1e-3,
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 7,
    "eos_token_id": [8, 9],
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": ROWS,
}
TIKTOKEN = b"IQ== 0\nIg== 1\n"
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def draw(shape=SHAPE, dtype="float32"):
    """Random weights by their Hugging Face names."""
    random = np.random.default_rng(0)
    sizes = dict(tensors(shape).values())
    return {name: random.normal(size=size).astype(dtype) for name, size in sizes.items()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def write(folder, tokenizer):
    """Writes a model in Hugging Face layout, in one file or in shards; absent keys are None."""

    def write(config=CONFIG, weights=None, shards=1, tokenizer_bytes=tokenizer.model_bytes):
        folder.mkdir(exist_ok=True)
        weights = draw() if weights is None else weights
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v is not None})
        )
        (folder / "tokenizer.model").write_bytes(tokenizer_bytes)
        names = list(weights)
        if shards == 1:
            save_file(weights, folder / "model.safetensors")
            return str(folder)
        index = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: weights[name] for name in names[shard::shards]}
            save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return str(folder)

    return write


@pytest.fixture
def workdir(tmp_path):
    return str(tmp_path / "imported")


@pytest.fixture
def refused(folder, workdir):
    """import-hf as it fails: with one line, and no checkpoint."""

    def refused(match, **settings):
        with pytest.raises(UserError, match=match) as raised:
            import_hf(str(folder), workdir, **settings)
        assert "\n" not in str(raised.value)
        with pytest.raises(UserError, match="no checkpoint there"):
            open_checkpoint(workdir)

    return refused


def cut_to(rows, weights):
    return {name: x[:rows] if name in (EMBEDDING, HEAD) else x for name, x in weights.items()}


def assert_holds(opened, weights):
    """Every parameter is that of the weights, as float32, and the padding is zero."""
    weights = {name: x.astype("float32") for name, x in weights.items()}
    wanted = to_params(cut_to(opened.shape.vocab_size, weights), opened.shape)
    found = opened.params()
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, leaf), value in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_array_equal(value, leaf, str(path))


@pytest.mark.parametrize(
    ("dtype", "shards", "settings", "sizes"),
    [
        ("float32", 1, {}, {}),
        (
            "float16",
            3,
            {"tie_word_embeddings": True, "rope_parameters": None, "rope_theta": 500},
            {"tied": True},
        ),
        (
            "bfloat16",
            2,
            {
                "head_dim": None,
                "rope_parameters": None,
                "rope_scaling": {"type": "default"},
                "rope_theta": 500.0,
                "tie_word_embeddings": None,
            },
            {"head_dim": 8},
        ),
        (
            "float32",
            2,
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "num_key_value_heads": None,
                "rope_parameters": None,
                "sliding_window": 64,
            },
            {"kv_heads": 4, "rope_theta": 10_000.0},
        ),
    ],
    ids=["plain", "tied, old rope", "no head_dim, old rope", "mistral, no rope"],
)
def test_every_number_arrives(write, workdir, tokenizer, dtype, shards, settings, sizes):
    """In its place and bit by bit; a transpose or an order of heads that is wrong moves it."""
    shape = dataclasses.replace(SHAPE, **sizes)
    weights = draw(shape, dtype)
    path = import_hf(write(CONFIG | settings, weights, shards), workdir)
    opened = open_checkpoint(workdir)
    assert str(opened.path) == path
    assert opened.shape == dataclasses.replace(shape, vocab_size=300)
    assert opened.dtype == dtype
    assert_holds(opened, weights)
    assert opened.tokenizer_bytes == tokenizer.model_bytes
    about = opened.about
    assert about["identity"]["tokenizer"] == tokenizer.digest
    assert (about["begin_id"], about["end_id"]) == (tokenizer.begin_id, tokenizer.end_id)
    assert about["sequence_length"] == 64


@pytest.fixture(scope="module")
def stories(real_data, tmp_path_factory):
    """A trained model, imported by the command line."""
    source = real_data / "checkpoints" / "stories260k"
    workdir = tmp_path_factory.mktemp("stories") / "imported"
    bindings = {"source": source, "workdir": workdir}
    flags = [f"--gin.import_hf.{name}={value}" for name, value in bindings.items()]
    assert cli.main(["import-hf", *flags]) == 0
    golden = json.loads((source / "golden.json").read_text())
    return open_checkpoint(str(workdir)), golden


def test_logits_of_a_trained_model(stories):
    opened, golden = stories
    ids = golden["greedy_ids"][:64]
    run = jax.jit(logits, static_argnums=0)
    found = np.asarray(run(Decoder(opened.shape), opened.params(), jnp.asarray([ids]))[0])
    np.testing.assert_allclose(found[-1], golden["last_logits_of_first_64"], atol=1e-4)
    assert opened.about["sequence_length"] == 512


def test_a_chosen_dtype_is_stored(write, workdir):
    weights = draw()
    import_hf(write(weights=weights), workdir, dtype="bfloat16")
    opened = open_checkpoint(workdir)
    assert opened.dtype == "bfloat16"
    assert_holds(opened, {name: x.astype(ml_dtypes.bfloat16) for name, x in weights.items()})


@pytest.mark.parametrize(
    ("matrix", "norm", "stored"),
    [
        ("float16", "float32", "float16"),
        ("bfloat16", "float16", "float32"),
        ("float32", "float32", "float32"),
    ],
)
def test_the_dtype_of_matrices_that_differ(write, workdir, capsys, matrix, norm, stored):
    """Norms do not count, bfloat16 and float16 do not hold one another."""
    weights = draw(dtype=matrix)
    weights[NORM] = weights[NORM].astype(norm)
    if norm == "float16":
        weights[QUERY] = weights[QUERY].astype(norm)
    import_hf(write(weights=weights), workdir)
    assert open_checkpoint(workdir).dtype == stored
    said = capsys.readouterr().out
    assert (f"all parameters are stored as {stored}" in said) == (matrix != norm)


def test_padded_rows_are_named(write, workdir, capsys):
    """Those above the ids are left out, whatever they hold; those below are kept."""
    weights = draw()
    weights[EMBEDDING][300:] = np.nan
    weights[EMBEDDING][[3, 5, 6]] = 0
    weights[EMBEDDING][297:300] = 0.5
    import_hf(write(weights=weights), workdir)
    said = capsys.readouterr().out
    assert "10 rows (300-309) left out" in said
    assert "3 rows (3, 5-6) all zero, kept" in said
    assert "3 rows (297-299) all the same, kept" in said
    assert_holds(open_checkpoint(workdir), weights)


def test_nothing_is_said_of_a_full_embedding(write, workdir, capsys):
    import_hf(write(CONFIG | {"vocab_size": 300}, cut_to(300, draw())), workdir)
    assert "row" not in capsys.readouterr().out


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
    assert_holds(opened, weights)
    said = capsys.readouterr().out
    assert "5 rows (305-309) all zero, kept" in said and "the same" not in said


@pytest.mark.parametrize(("mark", "found"), [([8, 9], 8), (9, 9), (0, 0), (None, None), ([], None)])
def test_marks_of_a_config(write, folder, mark, found):
    write(CONFIG | {"eos_token_id": mark})
    assert read_config(folder / "config.json").end_id == found


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "qwen2"}, r"model_type is 'qwen2' .*expected llama \(Llama.* or mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True, .*expected False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', .*expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"num_experts": 4}, "num_experts is 4"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"bias": True}, "json: bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"sliding_window": 63}, "sliding_window is 63, .* max_position_embeddings, 64"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters is"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0 but rope_parameters.rope_theta is 500.0"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'"),
        ({"hidden_size": None}, "hidden_size is missing, expected a positive int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"num_key_value_heads": 3}, r"config.json: ModelShape.heads 4 is not divisible"),
        # What contradicts the tensors.
        ({"num_key_value_heads": 4}, r"layers.0.self_attn.k_proj.weight float32\[12, 32\], .*24"),
        ({"head_dim": None}, r"k_proj.weight float32\[12, 32\], expected \[16, 32\]"),
        ({"intermediate_size": 48}, r"down_proj.weight float32\[32, 40\], expected \[32, 48\]"),
        ({"vocab_size": 320}, r"embed_tokens.weight float32\[310, 32\], expected \[320, 32\]"),
        (
            {"num_hidden_layers": 3},
            r"no tensor model.layers.2.\S+ \(and 8 more\), expected \[12, 32\]",
        ),
        ({"num_hidden_layers": 1}, r"model.layers.1.\S+ float32.* \(and 8 more\) is left over"),
        ({"tie_word_embeddings": True}, "lm_head.weight .* tie_word_embeddings is true"),
    ],
    ids=str,
)
def test_a_config_that_is_not_plain_llama_or_contradicts_itself(write, refused, settings, match):
    write(CONFIG | settings)
    refused(match)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": False, "mlp_bias": False, "num_experts": 0},
        {"sliding_window": 8, "use_sliding_window": False},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"architectures": None},
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_taken(write, folder, settings):
    write(CONFIG | settings)
    assert read_config(folder / "config.json").shape == SHAPE


@pytest.mark.parametrize("content", ["", "[]", "{", b"\xff"], ids=str)
def test_a_config_that_is_no_json_object(write, folder, refused, content):
    write()
    (folder / "config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    refused("config.json (cannot be read|holds a list, expected a JSON object)")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({QUERY: None}, rf"model has no tensor {QUERY}, expected \[24, 32\]"),
        ({HEAD: None}, rf"no tensor {HEAD}, expected \[310, 32\]"),
        (
            {QUERY: np.zeros((32, 24), "float32")},
            rf"{QUERY} float32\[32, 24\], expected \[24, 32\]",
        ),
        ({QUERY: np.zeros((24, 32))}, rf"{QUERY} F64\[24, 32\], expected one of float32, bfloat16"),
        ({QUERY: np.zeros((24, 32), "int8")}, rf"model.safetensors: {QUERY} I8\[24, 32\]"),
        (
            {QUERY: np.zeros((24, 32), ml_dtypes.float8_e4m3fn)},
            rf"{QUERY} F8_E4M3\[24, 32\], expected one of",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, "float32")},
            r"model.safetensors: model.layers.0.self_attn.q_proj.bias float32\[24\] is left over",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit(write, refused, changes, match):
    weights = draw() | changes
    write(weights={name: x for name, x in weights.items() if x is not None})
    refused(match)


def test_rotary_buffers_are_not_weights(write, workdir):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, "float32")}
    import_hf(write(weights=draw() | buffer), workdir)


def test_a_tied_head_may_be_there_as_a_copy(write, workdir, folder, refused):
    config = CONFIG | {"tie_word_embeddings": True}
    weights = draw()
    weights[HEAD] = weights[EMBEDDING].copy()
    weights[HEAD][-1, -1] += 1
    write(config, weights)
    refused(rf"{HEAD} float32\[310, 32\] is not {EMBEDDING}")
    weights[HEAD] = weights[EMBEDDING].astype(ml_dtypes.float8_e4m3fn)
    write(config, weights)
    refused(rf"{HEAD} F8_E4M3\[310, 32\] is not {EMBEDDING}")
    weights[HEAD] = weights[EMBEDDING]
    import_hf(write(config, weights), workdir)
    opened = open_checkpoint(workdir)
    assert opened.shape.tied and "head" not in opened.params()


@pytest.mark.parametrize(
    ("bad", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (-np.inf, "float16")]
)
def test_weights_that_are_not_finite(write, workdir, refused, capsys, bad, dtype):
    """Refused, with their name and number; then allowed, in the same workdir."""
    weights = draw(dtype=dtype)
    weights[QUERY][:2, 3] = bad
    source = write(weights=weights)
    refused(rf"{QUERY} {dtype}\[24, 32\] holds 2 NaN or infinite values.*allow_nonfinite = True")
    import_hf(source, workdir, allow_nonfinite=True)
    assert f"NaN or infinite values in {QUERY} (2)" in capsys.readouterr().out
    assert_holds(open_checkpoint(workdir), weights)


def test_weights_that_the_dtype_cannot_hold(write, refused):
    """65,504 is the largest float16; infinities of our own making are never allowed."""
    weights = draw()
    weights[QUERY][0, :3] = [65_504.0, 1e5, -1e5]
    write(weights=weights)
    refused(
        r"blocks/attention/query, layer 1, has 2 values too large for dtype = 'float16'",
        dtype="float16",
        allow_nonfinite=True,
    )


def test_what_is_no_model_in_this_layout(write, folder, workdir, refused, monkeypatch):
    refused("config.json does not exist")
    write(shards=2)
    index = folder / "model.safetensors.index.json"
    first = folder / "model-00001-of-00002.safetensors"

    shutil.copy(first, folder / "copy.safetensors")
    named = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": named | {"other": "copy.safetensors"}}))
    refused(r"is in \S+copy.safetensors and in \S+model-00001")
    index.write_text("{}")
    refused("index.json cannot be read")
    index.write_text(json.dumps({"weight_map": named}))

    content = first.read_bytes()
    first.write_bytes(content[:-1])
    refused("model-00001-of-00002.safetensors cannot be read: ")
    first.unlink()
    refused("index.json names model-00001-of-00002.safetensors, which is not there")
    first.write_bytes(content)

    shutil.copy(first, folder / "model.safetensors")
    refused("holds model.safetensors and model.safetensors.index.json, expected one of them")
    (folder / "model.safetensors").unlink()
    index.unlink()
    refused("holds neither model.safetensors nor model.safetensors.index.json")
    for name in ("pytorch_model-00001.bin", "pytorch_model-00002.bin"):
        (folder / name).write_bytes(b"pickle")
    refused(r"holds only pytorch_model-00001.bin \(and 1 more\), and reading a pickle runs")

    write()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(r"pip install 'pangu_tiny\[hf\]'")


def test_tokenizers_that_do_not_fit(write, folder, refused):
    way_out = "LLaMA-3, Qwen.*import_hf.whole_vocabulary = True"
    write(tokenizer_bytes=TIKTOKEN)
    refused(f"tokenizer.model is not a SentencePiece model; .*{way_out}")
    (folder / "tokenizer.model").unlink()
    refused(f"tokenizer.model does not exist; .*{way_out}")
    refused("tokenizer.json does not exist", whole_vocabulary=True)
    write(CONFIG | {"vocab_size": 299}, cut_to(299, draw()))
    refused(f"has 300 ids, but {EMBEDDING} in .* has 299 rows")


def test_settings_that_do_not_exist(write, refused, workdir):
    write()
    refused("import_hf.dtype is 'int8', expected one of float32", dtype="int8")
    with pytest.raises(UserError, match="gs://a/b, expected a local folder"):
        import_hf("gs://a/b", workdir)


def test_interrupted_and_run_again(write, workdir, monkeypatch, refused):
    """It is begun again, to the same end; once more changes nothing."""
    weights = draw()
    source = write(weights=weights)
    read = huggingface.Weights.read

    def interrupt(self, name):
        if name == QUERY:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(huggingface.Weights, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_hf(source, workdir)
    with pytest.raises(UserError, match="no checkpoint there"):
        open_checkpoint(workdir)
    path = import_hf(source, workdir)
    assert_holds(open_checkpoint(workdir), weights)
    with monkeypatch.context() as patched:
        patched.setattr(huggingface.Weights, "read", lambda *_: weights[EMBEDDING])
        assert import_hf(source, workdir) == path
    assert_holds(open_checkpoint(workdir), weights)


def test_another_import_is_refused(write, workdir, tokenizer, tmp_path):
    """Of other contents; what lies elsewhere but is the same is the same."""
    source = write()
    path = import_hf(source, workdir)
    moved = shutil.copytree(source, tmp_path / "moved")
    assert import_hf(str(moved), workdir) == path
    other = draw()
    other[QUERY][0, 0] += 1
    for settings, match in (
        ({"config": CONFIG | {"rms_norm_eps": 1e-5}}, "source is "),
        ({"weights": other}, "source is "),
        ({"tokenizer_bytes": tokenizer.select(range(299)).model_bytes}, "tokenizer is "),
    ):
        write(**settings)
        with pytest.raises(UserError, match=f"holds another run: {match}"):
            import_hf(source, workdir)
    with pytest.raises(UserError, match="holds another run: dtype is 'float32' there"):
        import_hf(str(moved), workdir, dtype="float16")


def test_one_tensor_is_in_memory_at_a_time(write, workdir):
    """24 MB, of which a matrix is 1 MB: as read, cast and on its way to disk."""
    shape = dataclasses.replace(SHAPE, depth=6, width=256, head_dim=64, ffn_width=1024)
    config = CONFIG | {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 1024,
    }
    source = write(config, draw(shape))
    tracemalloc.start()
    import_hf(source, workdir)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.3 * 4 * shape.parameters, peak
