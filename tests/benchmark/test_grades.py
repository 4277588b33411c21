"""What is written, graded."""

import pytest

from pangu_tiny.benchmark.grades import first_letters, rouge_1, same_result


@pytest.mark.parametrize(
    ("written", "reference", "grade"),
    [
        ("\n A cat sat here.\nB", "The cat sat.", 2 * 2 / (4 + 3)),
        ("the the cat", "the cat", 4 / 5),  # a word counts as often as it stands in both
        ("It's 3.5", "its 3 5", 2 * 2 / (4 + 3)),
        ("", "a", 0.0),
        ("猫", "猫", 0.0),  # words are of a to z alone
    ],
)
def test_rouge_1(written, reference, grade):
    assert rouge_1(written, reference) == pytest.approx(grade)


@pytest.mark.parametrize(
    ("written", "reference", "grade"),
    [("BD. A", "BD", 1), ("the B", "B", 1), ("E, AB", "AB", 1), ("B D", "BD", 0), ("", "A", 0)],
)
def test_first_letters(written, reference, grade):
    assert first_letters(written, reference) == grade


@pytest.mark.parametrize(
    ("written", "reference", "grade"),
    [
        (r"so \boxed{x = \frac{1}{2}} $3$", "1/2", 1),
        (r"is $4$ or $x=\dfrac12$.", r"\frac{1}{2}", 1),
        ("we get y = 12.", "12", 1),
        ("first 3, then 42 apples", "42", 1),
        ("3 apples", "4", 0),
        ("none", "4", 0),
        (r"$\sqrt3$", r"\sqrt{3}", 1),
        (r"$10\%$", "10", 1),
        (r"$.5$", "0.5", 1),
        (r"$\left( 1, 2 \right)$", "(1,2)", 1),
        (r"$5\text{ cm}$", "5", 1),
        (r"\boxed{7", "7", 0),
        ("x = 3，所以答案是5", "5", 1),
        ("1" * 5000 + "/2", "3", 0),
    ],
)
def test_same_result(written, reference, grade):
    assert same_result(written, reference) == grade
