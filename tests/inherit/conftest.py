"""A teacher whose tokenizer is that of a dataset, for all tests that rank."""

import pytest
import tiny_runs
from shapes import random_params
from teachers import save

from pangu_tiny.data.dataset import TokenDataset


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return TokenDataset.open(tiny_runs.prepare(tmp_path_factory.mktemp("dataset")))


@pytest.fixture(scope="session")
def ranked_shape():
    return tiny_runs.SHAPE


@pytest.fixture(scope="session")
def ranked_params(ranked_shape):
    return random_params(ranked_shape)


@pytest.fixture(scope="session")
def tokenizer_of_rows(rows):
    return rows.tokenizer_digest, rows.tokenizer_bytes()


@pytest.fixture(scope="session")
def teacher(ranked_shape, ranked_params, tokenizer_of_rows, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    return save(
        workdir, ranked_shape, ranked_params, tokenizer=tokenizer_of_rows, sequence_length=32
    )
