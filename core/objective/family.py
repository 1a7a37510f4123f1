"""The recipes in words: a table, one recipe whole, and the page docs/recipes.md; all of it read from the recipes themselves.

What an option means is read in the docstring of its slot's function: what follows `option:`, else the first line. What
runs where is found by trying.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from textwrap import fill, indent
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from core.objective.composition import ASKED, COMPONENTS, NEEDS, RANGES, SLOTS, Recipe
from core.objective.group import Group
from core.objective.recipes import RECIPES, grpo

GRADES = {
    "a": "read in the authors' code or in TRL's",
    "b": "read in the paper's text",
    "b*": "known through third parties",
    "c": "derived here",
}
# What may be trained: {kind: (what its trainer can give at best, whether each decision has a reward)}. What ASKED needs,
# logits and a prompt that can say more, only a language model has.
KINDS = {
    "language": (frozenset(NEEDS) - {"aligned"}, False),
    "aligned, a reward per rollout": (frozenset(NEEDS) - {"aligned", *ASKED}, False),
    "aligned, a reward per decision": (frozenset(NEEDS) - {*ASKED}, True),
}
ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{5})")


@dataclass(frozen=True)
class Option:
    """An option of a recipe. changed: plain GRPO has it not, or with another value. allowed: its values, in words."""

    name: str
    value: Any
    changed: bool
    allowed: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.name}: {_yaml(self.value)}"


def options(recipe: Recipe) -> list[Option]:
    """All options of a recipe, slot by slot."""
    found, plain = {}, grpo.options
    for slot in SLOTS:
        function = getattr(recipe, slot)
        while isinstance(function, partial):
            function = function.func
        for name in inspect.signature(function).parameters if function else ():
            if name in recipe.options and name not in found:
                value = recipe.options[name]
                changed = name not in plain or plain[name] != value
                found[name] = Option(name, value, changed, allowed(function, name), meaning(function, name))
    return list(found.values())


def allowed(function: Callable, option: str) -> str:
    """The values that an option of a slot's function may have, in words."""
    hint = get_type_hints(function)[option]
    low, high = RANGES.get(option, (-math.inf, math.inf))
    words = []
    for kind in (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,):
        if get_origin(kind) is Literal:
            words += [str(choice) for choice in get_args(kind)]
        elif kind in (int, float):
            number = "a whole number" if kind is int else "a number"
            bounds = f" from {low:g} to {high:g}" if high < math.inf else f" from {low:g} up" if low > -math.inf else ""
            words.append(number + bounds)
        else:
            words.append({type(None): "null", bool: "true or false", str: "a component's name"}[kind])
    return f"{', '.join(words[:-1])} or {words[-1]}" if words[1:] else words[0]


def meaning(function: Callable, option: str) -> str:
    """What the docstring of a slot's function says after `option:`, up to the next name; else its first line."""
    paragraphs = [" ".join(text.split()) for text in inspect.getdoc(function).split("\n\n")]
    begins, name = r"(?:^|(?<=[.;] ))", r"(?:\w+, )*{}(?:, \w+)*: "
    ends = rf"(?={begins}(?:{name.format('[a-z_]+')}|Raises |Returns |Source: )|$)"
    for paragraph in paragraphs:
        if said := re.search(f"{begins}{name.format(option)}(.*?){ends}", paragraph):
            return said.group(1).strip(" ;.")
    return paragraphs[0].strip(" ;.:")


def refusals(recipe: Recipe) -> dict[str, str]:
    """{kind: why the recipe refuses it}, without the kinds on which it gives credit."""
    found = {}
    for kind, (provides, per_decision) in KINDS.items():
        names = tuple(dict.fromkeys(["outcome", *(recipe.options.get(option, "outcome") for option in COMPONENTS)]))
        prompts, size, decisions = 2, 4 + ("extra_rollout" in recipe.needs), 3
        shape = (prompts, size, len(names), decisions) if per_decision else (prompts, size, len(names))
        rewards = torch.linspace(0, 1, math.prod(shape)).view(shape)
        rows = torch.ones(prompts * size, decisions)
        try:
            recipe.refuse(provides, names, f"{kind.partition(',')[0]} policy")
            group = Group(rewards, torch.ones(len(names)), rows, -rows, kind != "language", names=names, outcome=0)
            if not recipe.needs & set(ASKED):
                recipe.credit(group)
        except ValueError as error:
            found[kind] = str(error)
    return found


def table(width: int = 110) -> str:
    """The family, three lines a recipe: what it sets and needs, what it changes, where it is from."""
    wide = {"name": 22, "grade": 7, "sets": 2 + max(len(_words(recipe.sets)) for recipe in RECIPES.values())}
    place = sum(wide.values())
    lines = [f"{'recipe':22}{'grade':7}{'sets':{wide['sets']}}needs"]
    lines += ["-" * (place + max(len(_words(recipe.needs)) for recipe in RECIPES.values()))]
    for recipe in RECIPES.values():
        first = f"{recipe.name:22}{recipe.grade:7}{_words(recipe.sets):{wide['sets']}}{_words(recipe.needs)}"
        lines.append(fill(first, width, subsequent_indent=" " * place))
        lines += [_wrapped(text, width, "    ") for text in (recipe.summary, recipe.source)]
    return "\n".join(lines)


def describe(recipe: Recipe, width: int = 110) -> str:
    """One recipe, or a combination, whole: equation, source, needs and every option."""
    lines = [recipe.name, _wrapped(recipe.summary, width, "    "), "", indent(_equation(recipe), "    "), ""]
    facts = {
        "source": recipe.source,
        "grade": _grade(recipe),
        "sets": _words(recipe.sets),
        "needs": "; ".join(NEEDS[need] for need in NEEDS if need in recipe.needs) or "rewards and log-probabilities",
        "config": _config(recipe),
        **{f"not on {kind}": why for kind, why in refusals(recipe).items()},
    }
    lines += [fill(f"{name}: {text}", width, subsequent_indent="    ") for name, text in facts.items()]
    lines += ["", "options (* = not plain GRPO's)"]
    for option in options(recipe):
        lines.append(f"  {'*' if option.changed else ' '} {option}    ({option.allowed})")
        lines.append(_wrapped(option.meaning, width, "        "))
    return "\n".join(lines)


# -- the page -----------------------------------------------------------------------------------------------------------

INTRO = """\
# The GRPO family

{count} published objectives, each a *recipe*: it names the slots in which it is not plain GRPO, and the function of
`core/objective` that it puts there. Written by `make docs` from `core/objective/recipes.py`; edit that, not this page.

## How to use one

In an app's YAML file:

```yaml
{alone}
{changed}   # another value of one of its options
{both}   # several: each slot from the one recipe that sets it
```

or on the command line: `make train APP=text_to_sql SET="objective.recipe=dapo objective.epsilon_high=0.3"`.

- **Combining.** Recipes combine if no slot is set by two of them (column *sets*); else they are refused by name.
- **Options** are the keyword arguments of the functions in a recipe's slots, those of plain GRPO's slots included. An option
  or a value that does not exist is refused with the nearest one that does.
  `python -P -m core.main recipes --name {name}` prints all of them.
- **Needs** are what a recipe asks of the trainer beside rewards and log-probabilities. A trainer arranges it or refuses before
  the run starts, in these words:
{needs}
- **Grades** say how well the formulas are known: {grades}. Two grades: some formulas the one, some the other.
"""


def page() -> str:
    """docs/recipes.md, whole."""
    alone, changed, both = ("dapo", {}), ("dapo", {"epsilon_high": 0.3}), ("[gdpo, gspo]", {"beta": 0.01})
    examples = {
        name: f"objective: {{recipe: {recipe}{''.join(f', {key}: {value}' for key, value in more.items())}}}"
        for name, (recipe, more) in {"alone": alone, "changed": changed, "both": both}.items()
    }
    grades = "; ".join(f"{_plain(grade)} = {words}" for grade, words in GRADES.items())
    needs = "\n".join(f"  - `{need}`: {words}" for need, words in NEEDS.items())
    parts = [INTRO.format(count=len(RECIPES), name="dapo", needs=needs, grades=grades, **examples)]
    parts.append("## The family\n\n" + _rows(["recipe", "what it changes", "sets", "needs", "grade", "source"], [
        [f"[{r.name}](#{r.name})", r.summary, _code(r.sets), _code(sorted(r.needs)), _plain(r.grade), _links(r.source)]
        for r in RECIPES.values()
    ]))  # fmt: skip
    refused = {recipe.name: refusals(recipe) for recipe in RECIPES.values() if refusals(recipe)}
    parts.append(
        "## What runs where\n\nA language model's rollouts are of different decisions. *Aligned* rollouts, of flow and forecast "
        "policies, answer\nthe same question at decision t, so each decision may have its own reward. "
        f"{len(RECIPES) - len(refused)} recipes run on all three; the others:\n\n"
        + _rows(["recipe", *KINDS], [[name, *("no" if k in why else "yes" for k in KINDS)] for name, why in refused.items()])
        + "\n\n"
        + "\n".join(f"- {sentence}" for why in refused.values() for sentence in dict.fromkeys(why.values()))
    )
    return "\n\n".join([*parts, *(section(recipe) for recipe in RECIPES.values())]) + "\n"


def section(recipe: Recipe) -> str:
    """What the page says of one recipe."""
    parts = [f"## {recipe.name}", _plain(recipe.summary), f"```text\n{_equation(recipe)}\n```"]
    facts = [f"Source: {_links(recipe.source)}. Grade {_plain(recipe.grade)}: {_grade(recipe)}."]
    facts += [f"Sets {_code(recipe.sets)}."] if recipe.sets else []
    facts += [f"Needs {'; '.join(NEEDS[need] for need in NEEDS if need in recipe.needs)}."] if recipe.needs else []
    named = [option for option in COMPONENTS if option in recipe.options]
    facts += [f"The rewards must have a component `{recipe.options[option]}` (`{option}`)." for option in named]
    parts += ["\n".join(facts), f"```yaml\n{_config(recipe)}\n```"]
    changed = [option for option in options(recipe) if option.changed]
    same = [list(run) for _, run in groupby(changed, key=lambda option: option.meaning)]
    lines = ["- " + ", ".join(f"`{o}` ({o.allowed})" for o in run) + f": {_plain(run[0].meaning)}" for run in same]
    return "\n\n".join(parts + (["\n".join(lines)] if lines else []))


def _rows(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text in which Markdown finds no emphasis."""
    return re.sub(r"(?<!`)\*(?!`)", r"\\*", text)


def _links(source: str) -> str:
    return ARXIV.sub(lambda found: f"[{found.group()}](https://arxiv.org/abs/{found.group(1)})", source)


def _code(names) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def _grade(recipe: Recipe) -> str:
    return "; ".join(GRADES[grade] for grade in recipe.grade.split("/"))


def _equation(recipe: Recipe) -> str:
    return recipe.equation.replace(";  ", "\n")


def _config(recipe: Recipe) -> str:
    names = recipe.name.split("+")
    return f"objective: {{recipe: {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}}}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _words(names) -> str:
    return " ".join(sorted(names) if isinstance(names, frozenset) else names) or "-"


def _wrapped(text: str, width: int, margin: str) -> str:
    return fill(text, width, initial_indent=margin, subsequent_indent=margin)
