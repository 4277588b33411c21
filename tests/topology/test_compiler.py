"""Where compiled programs are kept."""

import jax
import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.topology.compiler import keep_compiled


def test_programs_are_kept_in_the_folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        keep_compiled(str(tmp_path / "kept"))
        jax.jit(lambda x: x * 3 + 1)(1.0)
        assert list((tmp_path / "kept").iterdir())
    finally:
        keep_compiled(before)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Hardware\.compilation_cache '.*/file/kept' cannot be"):
        keep_compiled(str(tmp_path / "file" / "kept"))
