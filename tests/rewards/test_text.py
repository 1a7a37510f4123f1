import time

import pytest

from rewards.canaries import generic
from rewards.score import BrokenRow
from rewards.text import fenced_blocks, length_within, ngram_jaccard, tagged, tags_in_order


def test_fenced_blocks_keep_order_language_and_content():
    text = "a\n```SQL\nSELECT 1\n```\nb\n```\nplain\n```\n```sql SELECT 2```\n```python\nnever closed"
    assert fenced_blocks(text) == [("sql", "SELECT 1"), ("", "plain"), ("sql", "SELECT 2")]


def test_tagged_needs_the_tag_exactly_once_and_closed_after_it_opens():
    assert tagged("x <a> 1 </a> y", "a") == "1"
    for text in ("<a>1", "1</a>", "</a>1<a>", "<a>1</a><a>2</a>", "<a><a>1</a>", "<A>1</A>"):
        assert tagged(text, "a") is None


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<a>1</a>\n<b>2</b>\n", True),
        ("<b>2</b><a>1</a>", False),
        ("<a>1<b>2</b></a>", False),
        ("<a>1</a> and <b>2</b>", False),
        ("<a>1</a><b>2</b> done", False),
        ("<a>1</a>", False),
    ],
)
def test_tags_in_order_allows_nothing_else(text, good):
    assert tags_in_order(text, ("a", "b")) is good


def test_ngram_jaccard_closed_forms():
    assert ngram_jaccard("abcd", "abce") == 2 / 4
    assert ngram_jaccard("abab", "ab") == 1 / 2  # sets, not bags
    assert ngram_jaccard("abc", "abd", n=1) == 2 / 4
    assert ngram_jaccard("a", "b") == 0.0
    assert ngram_jaccard("a", "a") == ngram_jaccard("", "") == 1.0


def test_hostile_text_is_read_in_linear_time():
    started = time.perf_counter()
    for text in ("```" * 300_000, "<a>" * 300_000, "```sql\n" * 100_000, "`" * 900_000):
        fenced_blocks(text), tagged(text, "a"), tags_in_order(text, ("a", "b"))
    assert time.perf_counter() - started < 2


def length(words: int, band=(20, 100, 400, 800)):
    score = length_within(" \n".join(["word"] * words), length_band=list(band))
    return score.value, score.reason


@pytest.mark.parametrize(
    ("words", "value", "reason"),
    [
        (10, 0, "too_short"), (20, 0, "too_short"), (60, 0.5, "too_short"), (100, 1, ""), (400, 1, ""),
        (600, 0.5, "too_long"), (800, 0, "too_long"), (801, 0, "too_long"),
    ],
)  # fmt: skip
def test_length_is_a_trapezoid(words, value, reason):
    assert length(words) == (value, reason)


def test_a_length_band_may_have_steep_ends_and_no_middle():
    steep = (5, 5, 9, 9)
    assert [length(n, steep)[0] for n in (4, 5, 9, 10)] == [0, 1, 1, 0]
    assert [length(n, (0, 4, 4, 8))[0] for n in (0, 2, 4, 6, 8)] == [0, 0.5, 1, 0.5, 0]
    assert length(0, (0, 0, 0, 0)) == (1, "")


@pytest.mark.parametrize(
    "band", [[20, 10, 400, 800], [0, 1, 3, 2], [-1, 1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5], [0, 1, 2, float("inf")],
             [float("nan")] * 4, ["1", 2, 3, 4], [1, 2, 3, "4"], "1234", None]
)  # fmt: skip
def test_a_length_band_that_is_not_one_is_a_broken_row(band):
    with pytest.raises(BrokenRow, match=r"length_band=.* ascending order"):
        length_within("some words", length_band=band)


@pytest.mark.parametrize("canary", generic("length_within"), ids=lambda canary: canary.name)
def test_length_pays_for_no_degenerate_answer(canary):
    completion = canary.completion({"question": "How many singers are there?"})
    assert length_within(completion, length_band=[20, 100, 400, 800]).value == 0
