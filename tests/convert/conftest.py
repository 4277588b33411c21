"""Models in Hugging Face layout, written and imported."""

import json

import pytest
from hf_models import CONFIG, draw
from safetensors.numpy import save_file

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.errors import UserError


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
