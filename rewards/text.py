"""Reading structure out of free text: fenced blocks, tags, n-grams, length. Standard library only; every function is linear."""

import math
import re
from collections.abc import Hashable, Sequence

from rewards.score import BrokenRow, Score

FENCE = "```"
LANGUAGE = re.compile(r"[ \t]*(?:(\w*)[ \t]*\r?\n|(sql|sqlite|json|python)\b)", re.IGNORECASE)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each closed ``` block in order; language is lower-case, "" where none is named.

    The language is a word alone on the fence's line, or a known one followed by the code on the same line.
    """
    parts = text.split(FENCE)
    blocks = []
    for part in parts[1 : len(parts) - 1 : 2]:  # an odd last part was never closed
        named = LANGUAGE.match(part)
        language = (named.group(1) or named.group(2) or "").lower() if named else ""
        blocks.append((language, part[named.end() if named else 0 :].strip()))
    return blocks


def tagged(text: str, tag: str) -> str | None:
    """What stands between <tag> and </tag> when each occurs exactly once and in this order; None otherwise."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() if start <= end else None


def tags_in_order(text: str, tags: Sequence[str]) -> bool:
    """Whether the text is <a>...</a> <b>...</b> for these tags: each exactly once, in order, nothing outside them."""
    position = 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if tagged(text, tag) is None or text[position : text.index(opening)].strip():
            return False
        position = text.index(closing) + len(closing)
    return not text[position:].strip()


def ngram_jaccard(first: Sequence[Hashable], second: Sequence[Hashable], n: int = 2) -> float:
    """|A & B| / |A | B| over the sets of n adjacent tokens, in [0, 1].

    Where neither sequence is long enough to have any: 1.0 if the sequences are equal, else 0.0.
    """
    grams = [{tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)} for tokens in (first, second)]
    union = len(grams[0] | grams[1])
    return len(grams[0] & grams[1]) / union if union else float(list(first) == list(second))


def length_within(completion: str, *, length_band: Sequence[float]) -> Score:
    """1 for a length in the middle of a band, falling to 0 at its ends: a trapezoid.

        0 outside [l_min, l_max], (n - l_min) / (l_low - l_min) below l_low, 1 up to l_high, then (l_max - n) / (l_max - l_high)

    length_band: [l_min, l_low, l_high, l_max] in words, per row, so that each task has its own. A word is a run of
    characters that are not blank: a text without blanks is one word. Says nothing of what the words are: 1 can be had for
    any of them, so never let it weigh as much as the outcome.
    Reasons: too_short below l_low, too_long above l_high. Raises BrokenRow unless 0 <= l_min <= l_low <= l_high <= l_max.
    Source: arXiv 2604.08539, there in tokens; read in the paper's text.
    """
    match length_band:
        case [
            int() | float() as l_min,
            int() | float() as l_low,
            int() | float() as l_high,
            int() | float() as l_max,
        ] if 0 <= l_min <= l_low <= l_high <= l_max < math.inf:
            words = len(completion.split())
        case _:
            raise BrokenRow(
                f"length_band={length_band!r} is not four numbers of words in ascending order, [l_min, l_low, l_high, l_max]"
            )
    if l_low <= words <= l_high:
        return Score(1.0)
    if words < l_low:
        return Score((words - l_min) / (l_low - l_min) if words > l_min else 0.0, "too_short", f"{words} words")
    return Score((l_max - words) / (l_max - l_high) if words < l_max else 0.0, "too_long", f"{words} words")
