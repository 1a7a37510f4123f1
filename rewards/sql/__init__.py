"""Rewards for text-to-SQL: what a query returns, whether it runs, and how close it is to gold in schema, text and
structure.

Columns of a row: `sql` (gold), `database` (path of the .sqlite file), `template` (prompt format, default "plain").
Execution needs only the standard library; whatever looks into the query's tree needs sqlglot (`pip install ".[sql]"`).
"""

from rewards.sql.attacks import CANARIES
from rewards.sql.composite import ORDERED, REASONING_SQL, is_ordered
from rewards.sql.execution import executes, execution_match
from rewards.sql.extract import TEMPLATES, extract_sql, format_ok, in_template
from rewards.sql.identity import result_identity
from rewards.sql.judge import judge
from rewards.sql.official import spider_execution
from rewards.sql.overlap import ngram_overlap, schema_overlap
from rewards.sql.structure import structure_match, structure_match_if_wrong

__all__ = [
    "CANARIES",
    "ORDERED",
    "REASONING_SQL",
    "TEMPLATES",
    "executes",
    "execution_match",
    "extract_sql",
    "format_ok",
    "in_template",
    "is_ordered",
    "judge",
    "ngram_overlap",
    "result_identity",
    "schema_overlap",
    "spider_execution",
    "structure_match",
    "structure_match_if_wrong",
]
