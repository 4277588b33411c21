"""An export as `transformers` itself loads it: its logits, its greedy text, its tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import write_checkpoint
from shapes import TINY, random_params

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert.export_hf import export_hf
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.evaluation.decoding import sample
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder, logits

pytestmark = pytest.mark.parity

PLAIN = dataclasses.replace(TINY, series_terms=1, shortcut_ratio=0)


def load(folder):
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(checkpoint, folder, prompt, texts):
    import torch

    opened, (model, theirs) = open_checkpoint(checkpoint), load(folder)
    params, decoder = opened.params(), Decoder(opened.shape)
    ids = np.random.default_rng(0).integers(0, opened.shape.vocab_size, (2, 60), np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    found = jax.jit(logits, static_argnums=0)(decoder, params, jnp.asarray(ids))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    tokenizer = opened.tokenizer()
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    begun = [opened.about["begin_id"], *tokenizer.encode(prompt)]
    assert theirs.encode(prompt) == begun
    count = 200
    made = model.generate(
        torch.tensor([begun]), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    assert list(sample(decoder, by_layer(params), begun, count)) == made[0, len(begun) :].tolist()


@pytest.mark.parametrize(
    "shape",
    [
        PLAIN,
        dataclasses.replace(PLAIN, tied=True, kv_heads=1, head_dim=10),
        dataclasses.replace(PLAIN, heads=3, kv_heads=3, head_dim=8),
        TINY,
        dataclasses.replace(TINY, series_terms=3, tied=True, kv_heads=4),
    ],
    ids=["plain", "tied, one key-value head", "heads do not divide", "modules", "modules, tied"],
)
def test_random_models(shape, tokenizer, texts, tmp_path):
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    run = write_checkpoint(tmp_path / "run", shape, random_params(shape), tokenizer, 512)
    folder = export_hf(run, str(tmp_path / "out"))
    assert_same(run, folder, "the cat", texts[:200])


def test_a_trained_model(real_data, tmp_path):
    source = real_data / "checkpoints" / "stories260k"
    run = import_hf(str(source), str(tmp_path / "run"))
    folder = export_hf(run, str(tmp_path / "out"))
    assert_same(run, folder, "Once upon a time", ["Lily ran.", "  two  spaces", "größer 世界 🙂"])
