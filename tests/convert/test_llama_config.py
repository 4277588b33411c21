"""config.json: rotary positions that scale nothing are taken, all that is not sound is refused."""

import json
import math

import pytest
from hf_models import CONFIG, SHAPE

from pangu_tiny.convert.llama import read_config
from pangu_tiny.errors import UserError


@pytest.fixture
def read(tmp_path):
    """The config with other settings; absent ones are None."""

    def read(settings):
        config = {k: v for k, v in (CONFIG | settings).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_config(tmp_path / "config.json")

    return read


@pytest.fixture
def refused(read):
    def refused(settings, match):
        with pytest.raises(UserError, match=match) as raised:
            read(settings)
        assert "\n" not in str(raised.value)
        assert "config.json" in str(raised.value)

    return refused


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 500.0, **settings}}


def scaling(**settings):
    """As older files have it."""
    return {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": settings}


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        (rope(rope_type="default", factor=8.0), 64),
        (rope(factor=8.0, low_freq_factor=1.0, original_max_position_embeddings=16), 64),
        (rope(rope_type="linear", factor=1.0), 64),
        (rope(rope_type=None, type="linear", factor=1), 64),
        (rope(rope_type="dynamic", factor=4.0), 64),
        (rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16), 16),
        (rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=128), 64),
        (rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=None), 64),
        (scaling(type="linear", factor=1.0), 64),
        (scaling(type="dynamic", rope_type="dynamic", factor=2.0), 64),
        (scaling(type="dynamic", original_max_position_embeddings=32), 32),
        (scaling(), 64),
        (rope(rope_type="linear", factor=1.0) | {"rope_scaling": {"type": "dynamic"}}, 64),
    ],
    ids=str,
)
def test_rotary_positions_that_scale_nothing_within_the_context(read, settings, context):
    found = read(settings)
    assert (found.shape, found.sequence_length) == (SHAPE, context)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (rope(rope_type="linear", factor=2.0), "rope_parameters is 'linear' with factor 2.0"),
        (rope(rope_type="linear"), "'linear' with factor None, .*expected factor 1.0"),
        (rope(rope_type="linear", factor=True), "'linear' with factor True"),
        (rope(rope_type="linear", factor="1.0"), "'linear' with factor '1.0'"),
        (rope(rope_type="linear", factor=math.nan), "'linear' with factor nan"),
        (scaling(type="linear", factor=0.5), "rope_scaling is 'linear' with factor 0.5"),
        (rope(rope_type="llama3", factor=1.0), "'llama3', which changes .*expected 'default'"),
        (rope(rope_type="yarn", factor=1.0), "'yarn', which changes"),
        (scaling(type="longrope", short_factor=[1.0] * 3, long_factor=[1.0] * 3), "'longrope'"),
        (rope(rope_type=["dynamic"]), r"is \['dynamic'\], which changes"),
        (rope(rope_type="default", type="linear"), "rope_type is 'default' but type is 'linear'"),
        (rope(rope_type="dynamic", alpha=1000.0), "rope_parameters has alpha, which is not impl"),
        (rope(rope_type="dynamic", factor=math.nan), "rope_parameters: factor is nan"),
        (rope(rope_type="default", mrope_section=[1, 1, 1]), "has mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "has full_attention"),
        (rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, .* expected 1.0"),
        (
            rope(rope_type="dynamic", original_max_position_embeddings="16"),
            "rope_parameters: original_max_position_embeddings is '16', expected a positive int",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected a JSON object"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected a JSON object"),
        # Numbers that no model has.
        ({"rope_theta": math.nan, "rope_parameters": None}, "rope_theta is nan"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta is 1000"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf, expected a positive float"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"hidden_size": 10**20}, "hidden_size is 1000+, expected a positive int up to 1,073"),
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"head_dim": [6]}, r"head_dim is \[6\]"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        ({"eos_token_id": 310}, "eos_token_id is 310, expected .* below vocab_size, 310"),
        ({"eos_token_id": [8, "9"]}, r"eos_token_id is \[8, '9'\]"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"bos_token_id": {"id": 7}}, r"bos_token_id is \{'id': 7\}"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_sound_is_refused(refused, settings, match):
    refused(settings, match)


@pytest.mark.parametrize(("mark", "found"), [([8, 9], 8), (9, 9), (0, 0), (None, None), ([], None)])
def test_marks(read, mark, found):
    assert read({"eos_token_id": mark}).end_id == found


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "config.json is empty, expected a JSON object"),
        (b" \n", "config.json is empty"),
        (b"[]", "holds a list, expected a JSON object"),
        (b"{", "config.json cannot be read: "),
        (b"\xff", "config.json cannot be read: "),
        (b"[" * 100_000, "config.json cannot be read: "),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "config.json cannot be read: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a git-lfs pointer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_json_object(tmp_path, content, match):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(raised.value)
