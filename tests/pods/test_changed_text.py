"""Text on gs:// that was changed since it was read is noticed as on a disk."""

import json

import pytest
from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.vocabulary.count_tokens import count_tokens

pytestmark = pytest.mark.pods

LINES = [json.dumps({"text": f"the cat {i:05} sat away, ran and sat"}) for i in range(4000)]


def test_text_of_a_bucket_is_compared(bucket, tokenizer_file, capsys):
    """Units, counts and what the text was lie there too."""
    file = epath.Path(bucket) / "changes" / "cats.jsonl"

    def write(word):
        text = "\n".join(LINES)
        file.write_text(text.replace("cat 02000", f"{word} 02000"))

    def count():
        return count_tokens(
            f"{bucket}/changes/counts", str(file), tokenizer_file, processes=1, unit_bytes=2**16
        )

    write("cat")
    found = count()
    assert count() == found
    assert "comparing" not in capsys.readouterr().out
    write("cat")
    assert count() == found
    assert f"({file}); comparing it whole" in capsys.readouterr().out
    assert count() == found
    assert "comparing" not in capsys.readouterr().out
    write("dog")
    with pytest.raises(UserError, match=r"gs://bucket/changes/cats\.jsonl has changed since"):
        count()
