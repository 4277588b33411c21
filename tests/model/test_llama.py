"""The plain decoder is LLaMA: the logits of `transformers`, on random and on trained weights; and
with the modules of PanGu-π those of the code that export-hf ships."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_llama import GOLDEN, MODULES, MODULES_GOLDEN, SMALL, run_transformers
from hf_weights import to_params, to_shape
from safetensors.numpy import load_file

from pangu_tiny.evaluation.decoding import sample
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder, logits

jit_logits = jax.jit(logits, static_argnums=0)


def compute(config, weights, ids):
    shape = to_shape(config)
    params = jax.tree.map(jnp.asarray, to_params(weights, shape))
    return jit_logits(Decoder(shape), params, ids)


WRITTEN = pytest.mark.parametrize(
    ("file", "made_of"), [(GOLDEN, SMALL), (MODULES_GOLDEN, MODULES)], ids=["plain", "modules"]
)


@WRITTEN
def test_golden_logits_of_random_weights(file, made_of):
    """Float32 logits up to 5; a wrong ε, rotary base, pairing or order of heads is off by 0.1, and
    so is a shortcut that reads what is not normed."""
    with np.load(file, allow_pickle=False) as stored:
        golden = dict(stored)
    config = json.loads(golden.pop("__config__").item())
    assert config == made_of, "make_llama.py changed, run it again"
    ids, expected = golden.pop("__ids__"), golden.pop("__logits__")
    np.testing.assert_allclose(compute(config, golden, ids), expected, atol=1e-4)


@pytest.fixture(scope="module")
def stories(real_data):
    folder = real_data / "checkpoints" / "stories260k"
    shape = to_shape(json.loads((folder / "config.json").read_text()))
    params = to_params(load_file(folder / "model.safetensors"), shape)
    golden = json.loads((folder / "golden.json").read_text())
    return shape, jax.tree.map(jnp.asarray, params), golden


def test_logits_of_a_trained_model(stories):
    shape, params, golden = stories
    ids = golden["greedy_ids"][:64]
    found = np.asarray(jit_logits(Decoder(shape), params, jnp.asarray([ids]))[0])
    np.testing.assert_allclose(found[-1], golden["last_logits_of_first_64"], atol=1e-4)
    log_z = np.log(np.exp(found[:-1].astype(np.float64)).sum(axis=-1))
    nll = np.mean(log_z - found[np.arange(len(ids) - 1), ids[1:]])
    assert nll == pytest.approx(golden["first_64_ids_mean_nll"], abs=1e-5)


def test_greedy_text_of_a_trained_model(stories):
    """All 200 tokens, through the cache: a position off by one is another story."""
    shape, params, golden = stories
    prompt = golden["prompt_ids"]
    wanted = golden["greedy_ids"][len(prompt) :]
    assert list(sample(Decoder(shape), by_layer(params), prompt, len(wanted))) == wanted
    assert len(wanted) >= 199


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grouped", {}),
        ("tied", {"tie_word_embeddings": True}),
        ("one kv head", {"num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": 300}),
        ("all kv heads", {"num_key_value_heads": 4, "head_dim": 16, "hidden_size": 64}),
        ("modules, tied", {**MODULES, "series_terms": 3, "tie_word_embeddings": True}),
    ],
)
def test_logits_equal_those_of_transformers(name, changes):
    config = {**SMALL, **changes}
    weights, ids, expected = run_transformers(config, seed=1, length=70)
    np.testing.assert_allclose(compute(config, weights, ids), expected, atol=1e-4)


@pytest.mark.parity
@WRITTEN
def test_golden_file_is_what_transformers_computes_now(file, made_of):
    weights, ids, expected = run_transformers(made_of, seed=0, length=24)
    with np.load(file, allow_pickle=False) as golden:
        np.testing.assert_array_equal(golden["__ids__"], ids)
        np.testing.assert_allclose(golden["__logits__"], expected, atol=1e-4)
        for name, leaf in weights.items():
            np.testing.assert_array_equal(golden[name], leaf)
