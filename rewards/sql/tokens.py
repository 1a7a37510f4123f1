"""SQL as a list of tokens, without a parser: works on text that does not parse, and never sees a comment.

Lexical rules are SQLite's (sqlite.org/lang.html): '...' literals, "..." `...` [...] names, -- and /* */ comments, an
open comment runs to the end.
"""

import re

TOKEN = re.compile(
    r"""(?P<blank>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<text>[xX]?'(?:[^']|'')*(?:'|\Z))
    |(?P<name>"(?:[^"]|"")*(?:"|\Z)|`(?:[^`]|``)*(?:`|\Z)|\[[^\]]*(?:\]|\Z)|[^\W\d][\w$]*)
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<symbol>->>|->|<=|>=|<>|!=|==|\|\||<<|>>|.)""",
    re.VERBOSE | re.DOTALL,
)


def tokens(sql: str) -> list[str]:
    """Tokens in order: text literals as written, everything else lower-cased; comments and a final semicolon left
    out.
    """
    found = [
        match.group() if match.lastgroup == "text" else match.group().lower()
        for match in TOKEN.finditer(sql)
        if match.lastgroup != "blank"
    ]
    if found and found[-1] == ";":
        found.pop()
    return found


def without_word(sql: str, word: str) -> str:
    """The text with every bare token `word` cut out; literals, quoted names and comments keep theirs."""
    return "".join(
        match.group()
        for match in TOKEN.finditer(sql)
        if not (match.lastgroup == "name" and match.group().lower() == word)
    )


def without_comments(sql: str) -> str:
    """The text with every comment replaced by one space."""
    return "".join(
        " " if match.lastgroup == "blank" and match.group()[0] in "-/" else match.group()
        for match in TOKEN.finditer(sql)
    )


def top_level(sql: str) -> list[str]:
    """The tokens outside all parentheses. ORDER among them orders the whole statement: nothing else may stand there."""
    depth, outside = 0, []
    for token in tokens(sql):
        depth += (token == "(") - (token == ")")
        if depth == 0 and token != ")":
            outside.append(token)
    return outside


def depth(sql: str) -> int:
    """The deepest nesting of parentheses."""
    now = deepest = 0
    for token in tokens(sql):
        now += (token == "(") - (token == ")")
        deepest = max(deepest, now)
    return deepest
