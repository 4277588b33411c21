"""The scorer against all logits of every text on its own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import TINY, random_params

from pangu_tiny.benchmark.scorer import Shared, rows_of, score
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder, logits
from pangu_tiny.model.layout import param_shardings
from pangu_tiny.topology.mesh import make_mesh

LONG = [7, 8, 9] * 100  # read in two pieces
QUESTIONS = [
    [[1, 2, 3, 4], [1, 2, 5]],
    [[1, 2], [1, 2]],  # alike
    [[3, 4], [5, 6, 7]],  # nothing in common
    [[1, 2, 3], [1, 2], [1, 4, 5, 6]],  # one begins another
    [[*LONG, 4, 5], [*LONG, 5]],
]


def plain(ids, start=1):
    """Nats of the ids from a place on, and whether each is the likeliest."""
    if len(ids) <= start:
        return 0.0, True
    decoder, params = Decoder(TINY), random_params(TINY)
    said = jax.nn.log_softmax(logits(decoder, params, jnp.asarray([ids]))[0])
    said = np.asarray(said, np.float64)[start - 1 : len(ids) - 1]
    likeliest = bool((np.argmax(said, axis=-1) == ids[start:]).all())
    return -float(np.sum(said[np.arange(len(said)), ids[start:]])), likeliest


def drawn(beginning, length):
    """It, and the likeliest ids that follow."""
    decoder, params, ids = Decoder(TINY), random_params(TINY), list(beginning)
    for _ in range(length):
        ids.append(int(jnp.argmax(logits(decoder, params, jnp.asarray([ids]))[0, -1])))
    return ids


def test_what_is_shared_ends_before_the_first_that_differs():
    assert Shared.of([[1, 2, 3, 4], [1, 2, 5]]) == ([1], [[2, 3, 4], [2, 5]], 1)
    assert Shared.of([[3, 4], [5]]) == ([], [[3, 4], [5]], 1)
    assert Shared.of([[1, 2, 3], [1, 2]]) == ([1], [[2, 3], [2]], 1)


@pytest.fixture(scope="module")
def wanted():
    return [[plain(ids)[0] for ids in choices] for choices in QUESTIONS]


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 8, 1)], ids=str)
def test_nats_of_choices_are_those_of_whole_texts(wanted, sizes):
    """Padding that is seen, a token at the seam that is left out or counted twice, or a batch that
    is filled up and told, would give others; so would a mesh."""
    shared = [Shared.of(choices) for choices in QUESTIONS]
    rows = [shared[:3], [], [shared[4], shared[3]]]
    decoder = Decoder(TINY)
    if sizes is None:
        found = score(decoder, by_layer(random_params(TINY)), rows, 64)
    else:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            laid = jax.device_put(random_params(TINY), param_shardings(TINY, mesh))
            found = score(decoder, by_layer(laid), rows, 64)
    for one, place in zip(found, (0, 1, 2, 4, 3), strict=True):
        np.testing.assert_allclose(one.nats_k, wanted[place], rtol=1e-5, atol=1e-4)


def test_equal_choices_score_the_same():
    """C3 fills questions of three choices up with one of them: computed apart, at other places of a
    row, the second may come out a last bit lower, and count instead of the first."""
    random = np.random.default_rng(0)
    asked = []
    for _ in range(20):
        first, a, b = (random.integers(100, size=n).tolist() for n in (30, 9, 12))
        asked.append(Shared.of([first + a, first + b, first + a, first + a]))
    assert asked[0].positions == sum(len(ids) - 1 for ids in asked[0].rests[:2]) + 29
    for one in score(Decoder(TINY), by_layer(random_params(TINY)), [asked[:4], asked[4:8]], 64):
        assert one.nats_k[0] == one.nats_k[2] == one.nats_k[3] != one.nats_k[1]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_what_follows_a_context_is_scored_alone(sizes):
    """Within what is shared, at the seam, or after it; a context that is counted, or a choice that
    is told to be the likeliest by its last id alone, would differ."""
    context = [5, 6, 7]
    likely = drawn(context, 4)
    asked = [
        ([likely, [*likely[:-1], (likely[-1] + 1) % 300]], 3),
        ([[*context, 9, *likely[4:]], likely], 3),
        ([drawn(LONG, 2), [*LONG, 4]], len(LONG)),
        ([drawn(LONG, 3), [*LONG, 4]], len(LONG) + 1),
        ([[3, 4], [3, 5]], 1),
    ]
    shared = [Shared.of(choices, start) for choices, start in asked]
    mesh = make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        laid = jax.device_put(random_params(TINY), param_shardings(TINY, mesh))
        found = score(Decoder(TINY), by_layer(laid), [shared[:3], shared[3:]], 64)
    told = set()
    for one, (choices, start) in zip(found, asked, strict=True):
        for nats, likeliest, ids in zip(*one, choices, strict=True):
            wanted = plain(ids, start)
            assert nats == pytest.approx(wanted[0], rel=1e-5, abs=1e-4)
            assert likeliest == wanted[1]
            told.add(bool(likeliest))
    assert told == {False, True}


@given(st.lists(st.integers(0, 900), max_size=60))
def test_rows_hold_every_question_once_and_not_more_than_they_may(positions):
    rows = rows_of(positions)
    assert sorted(place for alike in rows for row in alike for place in row) == list(
        range(len(positions))
    )
    for alike in rows:
        taken = [sum(positions[place] for place in row) for row in alike]
        (length,) = {max(-(-most // 256), 1) * 256 for most in taken}
        longest = {max(-(-positions[row[0]] // 256), 1) * 256 for row in alike}
        assert longest == {length} and min(map(len, alike)) > 0


def test_short_questions_leave_little_room():
    """A row for each would be three times as many."""
    positions = np.random.default_rng(0).integers(20, 150, 500).tolist()
    (rows,) = rows_of(positions)
    assert len(rows) * 256 < 1.05 * sum(positions)


@pytest.mark.parity
def test_nats_are_the_loss_of_transformers(real_data, tmp_path):
    """200 texts of every benchmark at hand, each scored with the other choices of its question: its
    loss, times the tokens that it counts."""
    import torch
    from etils import epath
    from transformers import AutoModelForCausalLM

    from pangu_tiny.benchmark.paper_tasks import TASKS
    from pangu_tiny.benchmark.put import put
    from pangu_tiny.checkpoints.read import open_checkpoint
    from pangu_tiny.convert.import_hf import import_hf

    source = real_data / "checkpoints" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32).eval()
    opened = open_checkpoint(import_hf(str(source), str(tmp_path / "run")))
    decoder, params = Decoder(opened.shape), by_layer(opened.params())
    names = [name for name in TASKS if name != "mmlu"]
    asked = [*put(opened, epath.Path(real_data / "benchmarks"), names, None)]
    random = np.random.default_rng(0)
    for name in names:
        of_task = [one for one in asked if one.key.startswith(f"{name}/")]
        drawn = [of_task[i] for i in random.permutation(len(of_task))]
        texts = 0
        for one in drawn:
            choices = [ids.tolist() for ids in one.ids]
            (found,) = score(decoder, params, [[Shared.of(choices)]], 1024)
            for ids, ours in zip(choices, found.nats_k, strict=True):
                given = torch.tensor([ids])
                with torch.inference_mode():
                    loss = float(model(input_ids=given, labels=given).loss)
                assert abs(loss * (len(ids) - 1) - ours) < 1e-4 * len(ids), one.key
            texts += len(choices)
            if texts >= 200:
                break
        assert texts >= min(200, len(drawn))
