"""Which SQL a completion answers with, and whether it kept to the prompt format it was asked for.

Order (paper notes on Reasoning-SQL, arXiv 2503.23157, section 4; assembled from read code of SQL-R1, SkyRL-SQL,
Think2SQL and OmniSQL): the last fenced sql block, else the text of the answer tag, else (lenient) the first SELECT or
WITH to the end. A final answer given twice is no answer: it would let a policy hedge.
"""

import re

from rewards.sandbox.sqlite import BLANK_OR_COMMENT, OTHER_STATEMENTS
from rewards.score import Score
from rewards.text import fenced_blocks, tagged, tags_in_order

TEMPLATES = {  # name: the tags in order, the last holds the answer
    "plain": (),
    "fenced": (),
    "reasoning": ("reasoning", "answer"),  # Think2SQL
    "think_answer": ("think", "answer"),  # SQL-R1, with a sql fence in the answer
    "think_solution": ("think", "solution"),  # SkyRL-SQL
}
ANSWER_TAGS = ("answer", "solution")
SQL_LANGUAGES = ("sql", "sqlite")
QUERY_WORD = re.compile(r"(?:select|with|values)\b", re.IGNORECASE)
STATEMENT_WORD = re.compile(rf"(?:select|values|{'|'.join(sorted(OTHER_STATEMENTS))})\b", re.IGNORECASE)
QUERY_START = re.compile(  # "with" is an English word: it starts a query only before `name AS (`
    r"\bselect\b|\bwith\s+(?:recursive\s+)?[\w\"`\[\]]+\s*(?:\([^()]*\)\s*)?as\s*(?:not\s+)?(?:materialized\s*)?\(",
    re.IGNORECASE,
)


def extract_sql(completion: str, strict: bool = False) -> str | None:
    """The one statement a completion answers with, without its final semicolon; None where there is none.

    strict: take only a fenced block or an answer tag, never bare text.
    """
    if any(completion.count(f"<{slash}{tag}>") > 1 for tag in ANSWER_TAGS for slash in ("", "/")):
        return None
    answers = [answer for tag in ANSWER_TAGS if (answer := tagged(completion, tag)) is not None]
    if len(answers) > 1:
        return None
    blocks = fenced_blocks(completion)
    fenced = [content for language, content in blocks if language in SQL_LANGUAGES]
    fenced = fenced or [content for language, content in blocks if not language]
    if fenced:
        sql = fenced[-1]
    elif answers:
        sql = answers[0]
    elif strict:
        return None
    elif any(
        start.match(completion, BLANK_OR_COMMENT.match(completion).end()) for start in (STATEMENT_WORD, QUERY_START)
    ):
        sql = completion  # also EXPLAIN SELECT and CREATE TABLE t AS SELECT: the SELECT in them is not the answer
    else:
        start = QUERY_START.search(completion)
        if start is None:
            return None
        sql = completion[start.start() :]
    return sql.strip().removesuffix(";").rstrip() or None


def in_template(sql: str, template: str = "plain", thought: str = "") -> str:
    """A completion that answers with `sql` in the named format: what a demonstration or a gold completion looks
    like.
    """
    if template == "plain":
        return sql
    block = f"```sql\n{sql}\n```"
    if template == "fenced":
        return f"{thought}\n{block}".strip()
    first, last = _tags(template)
    answer = block if template == "think_answer" else sql
    return f"<{first}>{thought}</{first}>\n<{last}>{answer}</{last}>"


def format_ok(completion: str, *, template: str = "plain") -> Score:
    """1 if the completion keeps to the named format, else 0.

    plain: one statement and no prose. fenced: exactly one fenced block, marked sql, at the very end. The tagged
    formats: each tag exactly once, in order, nothing outside them, something in the answer (think_answer: one sql block
    in it).
    """
    tags = _tags(template)
    if template == "plain":
        from rewards.sql.parse import parse

        text = completion.strip()
        good = QUERY_WORD.match(text) and parse(text) is not None
        return Score(1.0) if good else Score(0.0, "not_one_statement")
    if tags and not tags_in_order(completion, tags):
        return Score(0.0, "tags")
    answer = tagged(completion, tags[-1]) if tags else completion.strip()
    if template in ("fenced", "think_answer"):
        blocks = fenced_blocks(answer)
        if len(blocks) != 1 or blocks[0][0] not in SQL_LANGUAGES or not blocks[0][1] or not answer.endswith("```"):
            return Score(0.0, "fence")
    return Score(1.0) if answer else Score(0.0, "empty_answer")


def _tags(template: str) -> tuple[str, ...]:
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown; use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]
