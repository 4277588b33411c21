"""Drawing tokens: the laws of the draws, in batches, on a mesh, in narrower numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import TINY, random_params

from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.decoding import continuations, sample
from pangu_tiny.evaluation.sampling import Sampling, draw
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder, logits, parameter_shapes
from pangu_tiny.model.layout import param_shardings
from pangu_tiny.topology.mesh import make_mesh

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.15, 0.3])
LOGITS = jnp.asarray(np.log(PROBABILITIES) + 3.0, jnp.float32)
DRAWS = 4000


def frequencies(temperature=1.0, top_k=0, top_p=1.0, values=LOGITS):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = jax.jit(jax.vmap(lambda key: draw(values, key, Sampling(temperature, top_k, top_p))))(
        keys
    )
    return np.bincount(np.asarray(drawn), minlength=len(values)) / DRAWS


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 10**30}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 4]),  # the fewest that reach 0.41: 0.4 alone does not
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1e-6}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 4]),
        ({"top_k": 1, "top_p": 0.9}, [1]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 2}, [1, 4]),
        ({"temperature": 0.5, "top_p": 0.5}, [1]),  # of squared probabilities, 1 has 0.55
    ],
    ids=str,
)
def test_draws_follow_the_kept_part_of_the_distribution(settings, kept):
    """χ² of 4,000 seeded draws: below 20 by chance in all but 0.05 % of cases with 4 degrees of
    freedom; a temperature left out gives hundreds."""
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] ** (1 / settings.get("temperature", 1.0))
    expected /= expected.sum()
    found = frequencies(**settings)
    assert not found[expected == 0].any()
    chi_square = DRAWS * np.sum((found - expected)[kept] ** 2 / expected[kept])
    assert chi_square < 20


def test_temperature_zero_takes_the_likeliest():
    assert draw(LOGITS, jax.random.key(0), Sampling()) == 1
    assert draw(LOGITS, jax.random.key(0), Sampling(0, 3, 0.1)) == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ((-0.1, 0, 1.0), "generate.temperature is -0.1"),
        ((1.0, -1, 1.0), "generate.top_k is -1"),
        ((1.0, 0, 0.0), "generate.top_p is 0.0"),
        ((1.0, 0, 1.1), "generate.top_p is 1.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        Sampling(*settings).check()


@pytest.fixture(scope="module")
def tiny():
    return Decoder(TINY), by_layer(random_params(TINY))


def test_greedy_sampling_equals_the_whole_sequence_again_and_again(tiny):
    decoder, params = tiny
    stacked = random_params(TINY)
    ids = [1, 5, 9]
    drawn = list(sample(decoder, params, ids, 8))
    whole = jax.jit(logits, static_argnums=0)(decoder, stacked, jnp.asarray([ids + drawn]))[0]
    assert drawn == np.argmax(whole[len(ids) - 1 : -1], axis=-1).tolist()


def test_the_end_mark_ends_and_is_not_given(tiny):
    decoder, params = tiny
    drawn = list(sample(decoder, params, [1, 5, 9], 8))
    end = drawn[3]
    assert list(sample(decoder, params, [1, 5, 9], 8, end_id=end)) == drawn[: drawn.index(end)]


def test_a_seed_gives_the_same_draws_and_another_seed_others(tiny):
    decoder, params = tiny

    def drawn(seed):
        return list(sample(decoder, params, [1], 12, sampling=Sampling(2.0), seed=seed))

    assert drawn(0) == drawn(0) != drawn(1)


def test_ids_beyond_the_tokenizer_are_not_drawn(tiny):
    """A model may have more ids than its tokenizer, which could not decode them."""
    decoder, params = tiny
    drawn = list(sample(decoder, params, [1], 20, sampling=Sampling(50.0), vocab_size=4))
    assert max(drawn) < 4


def test_a_batch_gives_what_its_prompts_give_alone(tiny):
    """Of several lengths, one of them read in two pieces, drawn in stretches: padding that is seen,
    a position that counts it, or a key that depends on the batch would give other tokens."""
    decoder, params = tiny
    prompts = [[3], list(range(70, 75)), [7, 8] * 150]
    settings = {"sampling": Sampling(1.0), "seed": 5}

    def joined(prompts, tokens, **more):
        drawn = list(continuations(decoder, params, prompts, tokens, **settings, **more))
        return [np.concatenate(parts)[:tokens] for parts in zip(*drawn, strict=True)]

    tokens_kb, logs_kb = joined(prompts, 8, stretch=3)
    assert tokens_kb.shape == (8, 3)
    whole = jax.jit(logits, static_argnums=0)
    for place, prompt in enumerate(prompts):
        alone_k1, alone_logs_k1 = joined([prompt], 8, numbers=[place])
        assert alone_k1[:, 0].tolist() == tokens_kb[:, place].tolist()
        np.testing.assert_allclose(alone_logs_k1[:, 0], logs_kb[:, place], atol=1e-4)
        ids = [*prompt, *tokens_kb[:, place].tolist()]
        said = jax.nn.log_softmax(
            whole(decoder, random_params(TINY), jnp.asarray([ids]))[0, len(prompt) - 1 : -1]
        )
        wanted = np.asarray(said)[np.arange(8), tokens_kb[:, place]]
        np.testing.assert_allclose(logs_kb[:, place], wanted, atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_a_mesh_gives_what_one_device_gives(tiny, sizes):
    """Three prompts, which fill no mesh; the cache lies on it as the model does."""
    decoder, params = tiny
    prompts = [[3], list(range(70, 75)), [7, 8] * 150]

    def drawn(params):
        parts = continuations(
            decoder, params, prompts, 7, sampling=Sampling(1.0), seed=5, stretch=3
        )
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    tokens_kb, logs_kb = drawn(params)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        laid = jax.device_put(random_params(TINY), param_shardings(TINY, mesh))
        found = drawn(by_layer(laid))
    np.testing.assert_array_equal(found[0], tokens_kb)
    np.testing.assert_allclose(found[1], logs_kb, atol=1e-4)


def test_matrices_may_be_stored_in_the_dtype_of_the_decoder():
    """To the same bits: what is stored narrower is what would be cast where it is used."""
    decoder, params = Decoder(TINY, jnp.bfloat16), random_params(TINY)
    target = parameter_shapes(TINY, jnp.bfloat16)
    narrower = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, target)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(narrower)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    ids = jnp.asarray([[1, 5, 9, 20]])
    whole = jax.jit(logits, static_argnums=0)
    np.testing.assert_array_equal(whole(decoder, narrower, ids), whole(decoder, params, ids))
