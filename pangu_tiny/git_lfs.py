"""Files that a clone without git-lfs leaves in place of large ones."""

from typing import Any

from pangu_tiny.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/v1"


def check_no_pointer(path: Any, head: bytes) -> None:
    """Refuses a file whose first bytes (or all of them) are those of a git-lfs pointer."""
    if head.startswith(_POINTER):
        raise UserError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where it was"
            " cloned"
        )
