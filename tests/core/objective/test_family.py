"""core.objective.family: the recipes in words say what the recipes do, and docs/recipes.md is what it writes."""

import re
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from objective_fixtures import flow_extras

from core.objective import family
from core.objective.aggregation import decoupled_sum
from core.objective.composition import ASKED, COMPONENTS, GIVES, NEEDS, RANGES, combine
from core.objective.group import Group
from core.objective.recipes import RECIPES, build, gdpo, grpo, gspo, ngrpo
from core.objective.rows import Counts, Rows
from core.train.arguments import PROVIDES

ROOT = Path(__file__).parents[3]
PAGE = MarkdownIt("commonmark").enable("table").parse(family.page())
EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


def slot(
    rows, *, near: float = 0.5, epsilon_low: float = 0.2, delta: float | None = None, eps: float = 1.0, virtual: int = 2,
    even: bool = True, gate: str = "x", way: Literal["up", "down"] = "up", ddof: Literal[0, 1] = 1
):  # fmt: skip
    """What it does: the first line.

    rows: not an option, and near: is not yet one. near: how near; at 0 None. It
    may be anything. epsilon_low, delta: two at once. way: up or down.
    Returns nothing. Source: a paper, see way: there.
    """


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("near", "a number"), ("epsilon_low", "a number from 0 to 1"), ("delta", "a number from 1 up or null"),
        ("virtual", "a whole number from 1 up"), ("even", "true or false"), ("gate", "the name of a component"),
        ("way", "up or down"), ("ddof", "0 or 1"),
    ],
)  # fmt: skip
def test_allowed_values_in_words(option, words):
    assert family.allowed(slot, option) == words


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("near", "how near; at 0 null. It may be anything"), ("epsilon_low", "two at once"), ("delta", "two at once"),
        ("way", "up or down"), ("even", "What it does: the first line"),
    ],
)  # fmt: skip
def test_the_meaning_of_an_option_is_read_in_the_docstring(option, words):
    assert family.meaning(slot, option) == words


@EVERY
def test_every_option_is_listed_with_its_value_and_with_bounds_that_hold(recipe):
    listed = {option.name: option for option in family.options(recipe)}
    assert {name: option.value for name, option in listed.items()} == recipe.options
    assert yaml.safe_load("\n".join(map(str, listed.values()))).keys() == recipe.options.keys()
    for name, option in listed.items():
        assert option.meaning
        assert (option.allowed == "the name of a component") is (name in COMPONENTS)
        if "a number" in option.allowed and (low := RANGES.get(name, [None])[0]):
            assert f"from {low:g}" in option.allowed
            with pytest.raises(ValueError, match="is outside"):
                recipe(**{name: low - 1})


def test_an_option_that_two_slots_share_stands_once_as_the_first_explains_it():
    assert next(o.meaning for o in family.options(gdpo) if o.name == "eps") == family.meaning(decoupled_sum, "eps")


def test_options_that_are_not_plain_grpo_s_are_marked():
    assert not [option for option in family.options(grpo) if option.changed]
    assert {str(option) for option in family.options(ngrpo) if option.changed} == {
        "highest: null", "virtual: 1", "eps: 1e-06", "filter: all_right", "epsilon_low: 0.16", "epsilon_high: 0.24",
        "reduction: token_mean",
    }  # fmt: skip


@EVERY
def test_a_recipe_gives_credit_and_a_loss_wherever_the_page_says_so(recipe):
    refused = family.refusals(recipe)
    assert len(refused) < len(GIVES)
    for kind, provides in GIVES.items():
        if kind in refused or recipe.needs & set(ASKED):
            continue
        recipe.refuse(provides, recipe.options.values(), kind)
        size = 3 if "extra_rollout" in recipe.needs else 4
        rewards = torch.rand(2, size, 4, generator=torch.Generator().manual_seed(0))
        if "aligned" in recipe.needs:
            rewards = rewards.unsqueeze(3).expand(-1, -1, -1, 5)
        names = ("outcome", "safety", "quality", "answer")
        old, mask = -torch.ones(2 * size, 5), torch.ones(2 * size, 5)
        aligned = kind != "language"
        group = Group(rewards, torch.ones(4), mask, old, aligned, names=names, outcome=0)
        credit = recipe.credit(group)
        rows = Rows(
            old - 0.1,
            mask,
            credit.advantage,
            Counts(2 * size, 10 * size, 5),
            old,
            keep=credit.keep,
            group_id=torch.arange(2 * size) // size,
            extras=credit.extras | flow_extras(-0.1 * mask),
        )
        assert recipe.loss(rows).sum.isfinite()


def test_what_cannot_run_says_why():
    refused = {name: set(found) for name, recipe in RECIPES.items() if (found := family.refusals(recipe))}
    assert {name for name, kinds in refused.items() if kinds == {"language"}} == {
        "value_anchored", "forecast_grpo", "faker_air"
    }  # fmt: skip
    assert {name for name, kinds in refused.items() if kinds == {"language", "forecast"}} == {
        "grpo_guard", "diffusion_nft", "group_preference"
    }  # fmt: skip
    asked = {name for name, recipe in RECIPES.items() if recipe.needs & set(ASKED)}
    assert {name for name, kinds in refused.items() if kinds == {"flow", "forecast"}} == asked
    assert len(refused) == 6 + len(asked)
    assert family.refusals(RECIPES["sample_routed"])["flow"] == f"needs {NEEDS['teacher']}"
    assert family.refusals(RECIPES["flow_grpo"](beta=0.04)) == {"language": f"needs {NEEDS['divergence']}"}


def test_what_a_language_model_can_give_is_what_its_trainer_gives():
    assert GIVES["language"] == PROVIDES


def test_reasons_that_another_one_includes_are_left_out():
    assert family._reasons(["needs a", "needs a; b", "needs a", "needs c"]) == "needs a; b; needs c"


@pytest.mark.parametrize("width", [100, 110, 120])
def test_the_table_holds_the_whole_family_within_its_width(width):
    lines = family.table(width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for recipe in RECIPES.values():
        asked = " ".join(family._asked(recipe)) or "-"
        sets = " ".join(family._sets(recipe)) or "-"
        line = f"{recipe.name} {recipe.grade} {sets} {asked} {recipe.summary} {recipe.source}"
        assert line in text


def test_a_loss_of_its_own_stands_for_the_slots_it_replaces():
    assert family._sets(RECIPES["diffusion_nft"]) == ["advantage", "loss_fn"]
    assert all([*family._sets(recipe)] == [*recipe.sets] for recipe in RECIPES.values() if recipe.loss_fn is None)
    shown = family.describe(RECIPES["group_preference"], 200)
    assert "\n  * beta: 5000.0    (a number from 0 up)\n        sharpness of the preference" in shown


def test_one_recipe_whole():
    said = family.describe(ngrpo, 200)
    assert "\n    clip(rho, 0.84, 1.24)\n" in said
    assert "  * epsilon_high: 0.24    (a number from 0 up or null)\n" in said
    assert "    beta: 0.0    (a number from 0 up)\n" in said
    assert "needs: only rewards and log-probabilities" in said
    assert f"not on language: needs {NEEDS['aligned']}" in family.describe(RECIPES["value_anchored"], 200)
    both = family.describe(combine([gdpo, gspo]), 300)
    assert f"needs: {NEEDS['whole_rollouts']}; {NEEDS['whole_batch']}" in both
    assert build(yaml.safe_load(re.search(r"^config: (.*)", both, re.M)[1])["objective"]) == combine([gdpo, gspo])


# -- the page -----------------------------------------------------------------------------------------------------------


def test_docs_are_up_to_date():
    assert (ROOT / "docs" / "recipes.md").read_text() == family.page(), "docs/recipes.md is stale: make docs"


def test_every_recipe_has_a_section_a_row_and_a_line_that_builds_it():
    headings = [PAGE[i + 1].content for i, token in enumerate(PAGE) if token.type == "heading_open"]
    assert headings[-len(RECIPES) :] == list(RECIPES)
    links = {child.attrs["href"] for token in PAGE for child in token.children or () if child.type == "link_open"}
    assert {f"#{name}" for name in RECIPES} == {link for link in links if link[0] == "#"}
    papers = {number for recipe in RECIPES.values() for number in re.findall(r"\d{4}\.\d{5}", recipe.source)}
    assert {f"https://arxiv.org/abs/{number}" for number in papers} == {link for link in links if link[0] != "#"}
    blocks = [token.content for token in PAGE if token.type == "fence" and token.info == "yaml"]
    assert [build(yaml.safe_load(block)["objective"]).name for block in blocks[-len(RECIPES) :]] == list(RECIPES)
    for line in blocks[0].splitlines():
        build(yaml.safe_load(line)["objective"])


def test_the_page_reads_the_same_raw_and_rendered():
    """No formula becomes a list, a quotation or a stress, and no line is too long to read, outside tables."""
    items = sum(token.type == "list_item_open" for token in PAGE)
    assert items == len(re.findall(r"^(?:  )?- (?=[`*])", family.page(), re.M))
    assert not [token for token in PAGE if token.type in ("blockquote_open", "ordered_list_open", "hr", "html_block")]
    stressed = [child for token in PAGE for child in token.children or () if child.type == "em_open"]
    assert len(stressed) == len(re.findall(r"(?<![*\\])\*\w+\*(?!\*)", family.page()))
    cells = [token for token in PAGE if token.type == "th_open"]
    assert len(cells) == 6 + 2 + len(GIVES)
    for line in family.page().splitlines():
        assert len(line) <= family.PAGE_WIDTH + 2 or line[0] == "|"


def test_a_line_breaks_neither_at_a_hyphen_nor_before_what_would_start_a_list():
    long = "x" * (family.PAGE_WIDTH - 6)
    assert family._flowed(f"{long} log-probability", "  ") == f"{long}\n  log-probability"
    assert family._flowed(f"y {long}xxxx - y") == f"y\n{long}xxxx -\ny"


def test_a_cell_of_a_table_may_hold_the_mark_between_cells():
    tokens = MarkdownIt("commonmark").enable("table").parse(family._rows(["a", "b"], [["KL(p || q)", "x"]]))
    assert [token.content for token in tokens if token.type == "inline"] == ["a", "b", "KL(p || q)", "x"]


def test_the_readme_counts_the_family():
    assert f"{len(RECIPES)} recipes" in (ROOT / "README.md").read_text()
