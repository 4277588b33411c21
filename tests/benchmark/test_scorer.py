"""The scorer against all logits of every text on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import TINY, random_params

from pangu_tiny.benchmark.scorer import Shared, nats
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import Decoder, logits
from pangu_tiny.model.layout import param_shardings
from pangu_tiny.topology.mesh import make_mesh

LONG = [7, 8, 9] * 100  # read in two pieces
QUESTIONS = [
    [[1, 2, 3, 4], [1, 2, 5]],
    [[1, 2], [1, 2]],  # alike
    [[3, 4], [5, 6, 7]],  # nothing in common
    [[1, 2, 3], [1, 2]],  # one begins the other
    [[*LONG, 4, 5], [*LONG, 5]],
]


def plain(ids):
    """Nats of all ids but the first."""
    if len(ids) < 2:
        return 0.0
    decoder, params = Decoder(TINY), random_params(TINY)
    said = jax.nn.log_softmax(logits(decoder, params, jnp.asarray([ids]))[0])
    return -float(np.sum(np.asarray(said, np.float64)[np.arange(len(ids) - 1), ids[1:]]))


def test_what_is_shared_ends_before_the_first_that_differs():
    assert Shared.of([[1, 2, 3, 4], [1, 2, 5]]) == ([1], [[2, 3, 4], [2, 5]])
    assert Shared.of([[3, 4], [5]]) == ([], [[3, 4], [5]])
    assert Shared.of([[1, 2, 3], [1, 2]]) == ([1], [[2, 3], [2]])


@pytest.fixture(scope="module")
def wanted():
    return np.array([[plain(ids) for ids in choices] for choices in QUESTIONS])


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 8, 1)], ids=str)
def test_nats_of_choices_are_those_of_whole_texts(wanted, sizes):
    """Padding that is seen, a token at the seam that is left out or counted twice, or a batch that
    is filled up and told, would give others; so would a mesh."""
    shared = [Shared.of(choices) for choices in QUESTIONS]
    decoder = Decoder(TINY)
    if sizes is None:
        found = nats(decoder, by_layer(random_params(TINY)), shared, 64)
    else:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            laid = jax.device_put(random_params(TINY), param_shardings(TINY, mesh))
            found = nats(decoder, by_layer(laid), shared, 64)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


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
            (found,) = nats(decoder, params, [Shared.of(choices)], 1024)
            for ids, ours in zip(choices, found, strict=True):
                given = torch.tensor([ids])
                with torch.inference_mode():
                    loss = float(model(input_ids=given, labels=given).loss)
                assert abs(loss * (len(ids) - 1) - ours) < 1e-4 * len(ids), one.key
            texts += len(choices)
            if texts >= 200:
                break
        assert texts >= min(200, len(drawn))
