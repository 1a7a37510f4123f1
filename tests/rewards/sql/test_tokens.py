from rewards.sql.tokens import depth, tokens, top_level, without_comments, without_word


def test_tokens_ignore_case_space_comments_and_the_last_semicolon_but_not_literals():
    assert tokens("SELECT  a.B -- x\n FROM t/* y */WHERE c>='It''s' ;") == [
        "select", "a", ".", "b", "from", "t", "where", "c", ">=", "'It''s'",
    ]  # fmt: skip
    assert tokens("1.5e-3<>.5||x'0F' \"A b\" [C d]") == ["1.5e-3", "<>", ".5", "||", "x'0F'", '"a b"', "[c d]"]


def test_comment_marks_inside_literals_are_text_and_open_comments_run_to_the_end():
    assert tokens("'-- no' '/* no'") == ["'-- no'", "'/* no'"]
    assert tokens("a /* b c") == tokens("a -- b c") == ["a"]
    assert without_comments("a--b\n'/*c*/'/*d*/e") == "a \n'/*c*/' e"


def test_without_word_keeps_literals_and_quoted_names():
    assert (
        without_word("COUNT(DISTINCT x), 'distinct', \"distinct\"", "distinct") == "COUNT( x), 'distinct', \"distinct\""
    )


def test_top_level_sees_nothing_inside_parentheses():
    assert top_level("SELECT (SELECT 1 ORDER BY 1) FROM t") == ["select", "from", "t"]
    assert depth("((a)(b(c)))") == 3
