import time

import pytest

from rewards.text import fenced_blocks, ngram_jaccard, tagged, tags_in_order


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
