import pytest

from rewards.sql import TEMPLATES, extract_sql, format_ok, in_template

FENCED = "First ```sql\nSELECT 1\n``` or better\n```sql\nSELECT 2;\n```"


@pytest.mark.parametrize(
    ("completion", "lenient", "strict"),
    [
        (FENCED, "SELECT 2", "SELECT 2"),
        (f"<answer>SELECT 3</answer> {FENCED}", "SELECT 2", "SELECT 2"),
        ("<think>SELECT 9</think><answer> SELECT 3 ; </answer>", "SELECT 3", "SELECT 3"),
        ("<think>x</think><solution>SELECT 4</solution>", "SELECT 4", "SELECT 4"),
        ("```\nSELECT 5\n```", "SELECT 5", "SELECT 5"),
        ("The query: select 6;", "select 6", None),
        ("With a join it is WITH t AS (SELECT 7) SELECT * FROM t", "WITH t AS (SELECT 7) SELECT * FROM t", None),
        ("-- why\nSELECT 8", "-- why\nSELECT 8", None),
        ("SELECT 8;;", "SELECT 8;", None),
        ("EXPLAIN SELECT 1", "EXPLAIN SELECT 1", None),
        ("CREATE TABLE t AS SELECT 1", "CREATE TABLE t AS SELECT 1", None),
        ("<answer>SELECT 1</answer><answer>SELECT 2</answer>", None, None),
        ("<answer>SELECT 1</answer><solution>SELECT 1</solution>", None, None),
        ("<answer></answer>", None, None),
        ("I do not know, with regret.", None, None),
        ("", None, None),
        (";", None, None),
    ],
)
def test_extraction_order(completion, lenient, strict):
    assert extract_sql(completion) == lenient
    assert extract_sql(completion, strict=True) == strict


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_gives_its_sql_back_and_keeps_its_own_format(template):
    sql = "WITH t AS (SELECT 1 AS a) SELECT a FROM t"
    completion = in_template(sql, template, thought="one < two" if template != "plain" else "")
    assert extract_sql(completion, strict=template != "plain") == sql
    assert format_ok(completion, template=template).value == 1.0


def test_no_template_accepts_the_format_of_another_but_fenced_inside_its_tags():
    completions = {template: in_template("SELECT 1", template) for template in TEMPLATES}
    accepted = {(asked, given) for asked in TEMPLATES for given in TEMPLATES
                if format_ok(completions[given], template=asked).value}  # fmt: skip
    assert accepted == {(template, template) for template in TEMPLATES}


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("plain", "The answer is SELECT 1"),
        ("plain", "SELECT 1\nThis query returns one row."),
        ("plain", "SELECT 1; SELECT 2"),
        ("plain", "SELECT (1"),
        ("plain", "DELETE FROM t"),
        ("plain", ""),
        ("fenced", "```sql\nSELECT 1\n``` done"),
        ("fenced", "```sql\nSELECT 1\n```\n```sql\nSELECT 1\n```"),
        ("fenced", "```python\nSELECT 1\n```"),
        ("reasoning", "<reasoning>a</reasoning><answer></answer>"),
        ("reasoning", "<answer>SELECT 1</answer><reasoning>a</reasoning>"),
        ("reasoning", "<reasoning>a</reasoning><answer>SELECT 1</answer><answer>SELECT 1</answer>"),
        ("reasoning", "<reasoning>a</reasoning><answer>SELECT 1</answer> done"),
        ("think_answer", "<think>a</think><answer>SELECT 1</answer>"),
    ],
)
def test_format_is_broken_by(template, completion):
    assert format_ok(completion, template=template).value == 0.0


def test_an_unknown_template_is_a_bug_and_names_the_known_ones():
    with pytest.raises(ValueError, match="template='xml' is unknown; use one of plain, fenced"):
        format_ok("SELECT 1", template="xml")
