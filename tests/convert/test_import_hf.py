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
from hf_models import CONFIG, EMBEDDING, HEAD, NORM, QUERY, SHAPE, draw
from hf_weights import to_params

from pangu_tiny import cli
from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.convert.llama import read_config
from pangu_tiny.convert.weights import Weights
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder, logits

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"


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
def test_weights_that_are_not_finite(write, refused, bad, dtype):
    """Refused, with their name and number."""
    weights = draw(dtype=dtype)
    weights[QUERY][:2, 3] = bad
    write(weights=weights)
    refused(rf"{QUERY} {dtype}\[24, 32\] holds 2 NaN or infinite values, expected none")


def test_weights_that_the_dtype_cannot_hold(write, refused):
    """65,504 is the largest float16; infinities of our own making are never allowed."""
    weights = draw()
    weights[QUERY][0, :3] = [65_504.0, 1e5, -1e5]
    write(weights=weights)
    refused(
        r"blocks/attention/query, layer 1, has 2 values too large for dtype = 'float16'",
        dtype="float16",
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
    beside = "expected the name of a file beside the index"
    for content, match in (
        ("{", "index.json cannot be read"),
        ("{}", "index.json: weight_map is None, expected names of tensors and files"),
        (LFS_POINTER, "index.json is a git-lfs pointer"),
        (
            '{"weight_map": {"a": ["b"]}}',
            r"index.json: a is in \['b'\], expected the name of a file",
        ),
        (
            '{"weight_map": {"a": "../model/x"}}',
            "a is in '../model/x', expected the name of a file",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', f"a is in '/etc/passwd', {beside}"),
        ('{"weight_map": {"a": ""}}', "index.json names , which is not there"),
    ):
        index.write_text(content)
        refused(match)
    index.write_text(json.dumps({"weight_map": named}))

    content = first.read_bytes()
    for damaged, match in (
        (content[:-1], "cannot be read: "),
        (content[:7], "cannot be read: "),
        (b"", "is empty, expected tensors"),
        (LFS_POINTER.encode(), "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
    ):
        first.write_bytes(damaged)
        refused(f"model-00001-of-00002.safetensors {match}")
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


def test_a_depth_beyond_all_tensors(write, refused):
    """Not one name is made for each layer that config.json claims."""
    write(CONFIG | {"num_hidden_layers": 2**30})
    refused("num_hidden_layers is 1,073,741,824, but there are only 21 tensors")


def test_settings_that_do_not_exist(write, refused, workdir):
    write()
    refused("import_hf.dtype is 'int8', expected one of None, float32", dtype="int8")
    with pytest.raises(UserError, match="gs://a/b, expected a local folder"):
        import_hf("gs://a/b", workdir)


def test_interrupted_and_run_again(write, workdir, monkeypatch, refused):
    """It is begun again, to the same end; once more changes nothing."""
    weights = draw()
    source = write(weights=weights)
    read = Weights.read

    def interrupt(self, name):
        if name == QUERY:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Weights, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_hf(source, workdir)
    with pytest.raises(UserError, match="no checkpoint there"):
        open_checkpoint(workdir)
    path = import_hf(source, workdir)
    assert_holds(open_checkpoint(workdir), weights)
    with monkeypatch.context() as patched:
        patched.setattr(Weights, "read", lambda *_: weights[EMBEDDING])
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
