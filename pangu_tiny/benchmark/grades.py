"""How good what a model wrote is, from 0 to 1, as OpenCompass has it."""

import collections
import re


def first_letters(written: str, reference: str) -> float:
    """Whether the first run of the letters A to D is the reference."""
    found = re.search("[A-D]+", written)
    return float(found is not None and found[0] == reference)


def rouge_1(written: str, reference: str) -> float:
    """F of the words that the first line shares with the reference; words are runs of a to z and 0
    to 9, of lower case (Lin 2004, without stemming)."""
    first = written.strip().split("\n")[0]
    ours, theirs = (
        collections.Counter(re.findall("[a-z0-9]+", text.lower())) for text in (first, reference)
    )
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def same_result(written: str, reference: str) -> float:
    """Whether the result that is written is the reference, both put into one form."""
    found = _result(written)
    return float(found is not None and _plain(found) == _plain(reference))


def _result(written: str) -> str | None:
    r"""After the last words that announce it: what is in the last \boxed, or between the first and
    the last $ of the last line that has them, or after the last =, or the last number."""
    for prefix in ("The answer is therefore", "答案是"):
        written = written.rpartition(prefix)[2]
    if (place := written.rfind("\\boxed{")) >= 0:
        depth, start = 0, place + len("\\boxed")
        for end in range(start, len(written)):
            depth += {"{": 1, "}": -1}.get(written[end], 0)
            if depth == 0:
                return _after_equals(written[start + 1 : end])
        return None
    if (dollars := re.findall(r"\$(.*)\$", written)) and dollars[-1]:
        return _after_equals(dollars[-1])
    if "=" in written:
        return written.split("=")[-1].lstrip(" ").rstrip(".").split("\\n")[0]
    numbers = re.findall(r"\$?\d+(?:\.\d+)?(?!\w)", written)
    return numbers[-1] if numbers else None


def _after_equals(text: str) -> str:
    return text.split("=")[-1].lstrip(" ") if "=" in text else text


def _plain(text: str) -> str:
    """One form of a result in LaTeX (Hendrycks et al. 2021, the equality of MATH)."""
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
        ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    if text.count("\\text{ ") == 1:
        text = text.split("\\text{ ")[0]  # a unit
    for old, new in (("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(?!\{)(.)(?!\{)(.)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(?!\{)(.)\{", r"\\frac{\1}{", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    if fraction := re.fullmatch(r"(-?\d+)/(-?\d+)", text):
        return "\\frac" + "".join(f"{{{part}}}" for part in fraction.groups())
    return text
