"""The corpus that every Python installation carries: the sources of its library."""

import json
import pathlib
import sysconfig
from collections.abc import Iterator

from etils import epath

from pangu_tiny.workdir import write_atomically

_LEFT_OUT = {
    "test", "tests", "idle_test",  # not what one wants a model to write
    "encodings", "pydoc_data",  # tables and generated text, which repeat themselves
    "site-packages", "dist-packages", "__pycache__", "lib2to3",
}  # fmt: skip


def write_python_library(path: epath.Path) -> None:
    """Writes the sources of Python's library as a .jsonl file, a document a module; idempotent."""
    if not path.exists():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in _sources())
        write_atomically(path, "\n".join(lines) + "\n")


def _sources() -> Iterator[str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(file.relative_to(root).parts):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield text
