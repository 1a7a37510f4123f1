"""The recipes in words: a table, one recipe whole, and the page docs/recipes.md; all of it read from the recipes themselves.

What an option means is read in the docstring of its slot's function: what follows `option:`, else the first line. What
runs where is found by trying.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from textwrap import TextWrapper, indent
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from core.objective.composition import ASKED, COMPONENTS, GIVES, LOSS_SLOTS, NEEDS, RANGES, Recipe
from core.objective.group import Group
from core.objective.recipes import RECIPES, grpo

GRADES = {
    "a": "read in the authors' code or in TRL's",
    "b": "read in the paper's text",
    "b*": "known through third parties",
    "c": "derived here",
}
ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{5})")
PAGE_WIDTH = 128


@dataclass(frozen=True)
class Option:
    """An option of a recipe. changed: plain GRPO does not have it, or with another value. allowed: its values, in words."""

    name: str
    value: Any
    changed: bool
    allowed: str
    meaning: str

    def __str__(self) -> str:
        """As in a config."""
        return f"{self.name}: {self.value if isinstance(self.value, str) else json.dumps(self.value)}"


def options(recipe: Recipe) -> list[Option]:
    """All options of a recipe, slot by slot."""
    found, values = {}, recipe.options
    for slot in recipe.slots:
        function = getattr(recipe, slot)
        while isinstance(function, partial):
            function = function.func
        for name in inspect.signature(function).parameters:
            if name in values and name not in found:
                changed = name not in grpo.options or grpo.options[name] != values[name]
                found[name] = Option(name, values[name], changed, allowed(function, name), meaning(function, name))
    return list(found.values())


def allowed(function: Callable, option: str) -> str:
    """The values that an option of a slot's function may have, in words."""
    hint = get_type_hints(function)[option]
    low, high = RANGES.get(option, (-math.inf, math.inf))
    words = []
    for kind in (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,):
        if get_origin(kind) is Literal:
            words += map(str, get_args(kind))
        elif kind in (int, float):
            bounds = f" from {low:g} to {high:g}" if high < math.inf else f" from {low:g} up" if low > -math.inf else ""
            words.append(("a whole number" if kind is int else "a number") + bounds)
        else:
            words.append({type(None): "null", bool: "true or false", str: "the name of a component"}[kind])
    return f"{', '.join(words[:-1])} or {words[-1]}" if words[1:] else words[0]


def meaning(function: Callable, option: str) -> str:
    """What the docstring of a slot's function says after `option:`, up to the next name; else its first line."""
    paragraphs = [" ".join(text.split()) for text in inspect.getdoc(function).replace("None", "null").split("\n\n")]
    begins, label = r"(?:^|(?<=[.;] ))", r"(?:\w+, )*{}(?:, \w+)*: "
    ends = rf"(?={begins}(?:{label.format('[a-zA-Z_]+')}|Raises |Returns )|$)"
    for paragraph in paragraphs:
        if said := re.search(f"{begins}{label.format(option)}(.*?){ends}", paragraph):
            return said.group(1).rstrip(" ;.")
    return paragraphs[0].rstrip(" ;.:")


def refusals(recipe: Recipe) -> dict[str, str]:
    """{kind: why a recipe cannot run on it}, for those of GIVES on which it cannot.

    A recipe that needs "aligned" gets a reward per decision, any other one per rollout, as from the trainers.
    """
    found = {}
    names = ("outcome", *_components(recipe).values())
    prompts, size, decisions = 2, 4 + ("extra_rollout" in recipe.needs), 3
    ones = torch.ones(prompts * size, decisions)
    for kind, provided in GIVES.items():
        if missing := [NEEDS[need] for need in NEEDS if need in recipe.all_needs - provided]:
            found[kind] = f"needs {'; '.join(missing)}"
        elif not recipe.needs & {*ASKED}:
            shape = (prompts, size, len(names), decisions)[: 4 if "aligned" in recipe.needs else 3]
            rewards = torch.linspace(0, 1, math.prod(shape)).view(shape)
            aligned = kind != "language"
            group = Group(rewards, torch.ones(len(names)), ones, -ones, aligned, names=names, outcome=0)
            try:
                recipe.credit(group)
            except ValueError as error:
                found[kind] = str(error)
    return found


def table(width: int = 110) -> str:
    """The family, three lines a recipe: what it sets and needs; what it changes; where it is from."""
    sets = 2 + max(len(_words(_sets(recipe))) for recipe in RECIPES.values())
    lines = [f"{'recipe':22}{'grade':7}{'sets':{sets}}needs", "-" * width]
    for recipe in RECIPES.values():
        head = f"{recipe.name:22}{recipe.grade:7}{_words(_sets(recipe)):{sets}}{_words(_asked(recipe))}"
        lines.append(_filled(head, width, "", " " * (29 + sets)))
        lines += [_filled(text, width, "    ", "    ") for text in (recipe.summary, recipe.source)]
    return "\n".join(lines)


def describe(recipe: Recipe, width: int = 110) -> str:
    """One recipe, or a combination, whole: equation, source, needs and every option."""
    facts = {
        recipe.name: recipe.summary,
        "source": recipe.source,
        "grade": f"{recipe.grade} = {_grade(recipe)}",
        "sets": _words(_sets(recipe)),
        "needs": _needs(recipe) or "only rewards and log-probabilities",
        **{f"not on {kind}": why for kind, why in refusals(recipe).items()},
        "config": _config(recipe.name.split("+")),
    }
    lines = [_filled(f"{name}: {text}", width, "", "    ") for name, text in facts.items()]
    lines[1:1] = ["", indent(_equation(recipe), "    "), ""]
    lines += ["", "options (* = not as in plain GRPO)"]
    for option in options(recipe):
        lines.append(f"  {'*' if option.changed else ' '} {option}    ({option.allowed})")
        lines.append(_filled(option.meaning, width, " " * 8, " " * 8))
    return "\n".join(lines)


# -- the page -----------------------------------------------------------------------------------------------------------

PAGE = """\
# The GRPO family

{count} objectives, each a *recipe*: it names the slots in which it is not plain GRPO, and the function of
`core/objective` that stands there. `make docs` writes this page from `core/objective/recipes.py`; edit that, not this.

## How to use one

In the YAML file of an app:

```yaml
{alone}
{changed}  # another value of one of its options
{both}  # several at once
```

or on the command line: `make train APP=text_to_sql SET="objective.recipe=dapo objective.epsilon_high=0.3"`.

- **Several at once**: each slot comes from the one recipe that sets it; two that set the same one are refused by name. A
  `loss_fn` takes the place of `surrogate`, `regularize`, `penalty` and `reduce`.
- **Options** are the keyword arguments of the functions in the slots, those of plain GRPO's slots included. An option or a value
  that does not exist is refused with the nearest one that does. `python -P -m core.main recipes --name dapo` prints them all.
- **Needs** are what a recipe asks of the trainer beside rewards and log-probabilities. The trainer arranges it, or refuses before
  the run starts, in these words (`reward:x`: a reward component of that name, for which weight 0 will do):
{needs}
- **Grades** say how well the formulas are known; of two grades each holds for a part:
{grades}

## The family

{family}

## What runs where

The rollouts of a language model decide different things at decision t. *Aligned* rollouts, those of flow and forecast policies,
answer one question there, so each decision may have its own reward: a recipe that needs `aligned` gets these, any other one
the reward of the rollout, which of a forecast is the mean over its decisions. {everywhere} recipes can run on all three. The
others:

{elsewhere}

{sections}
"""


def page() -> str:
    """docs/recipes.md, whole."""
    recipes, refused = RECIPES.values(), {name: refusals(recipe) for name, recipe in RECIPES.items()}
    family = [
        [f"[{r.name}](#{r.name})", r.summary, _code(_sets(r)), _code(_asked(r)), r.grade, _linked(r.source)]
        for r in recipes
    ]
    elsewhere = [
        [name, *("no" if kind in why else "yes" for kind in GIVES), _reasons(why.values())]
        for name, why in refused.items()
        if why
    ]
    return PAGE.format(
        count=len(RECIPES),
        alone=_config(["dapo"]),
        changed=_config(["dapo"], epsilon_high=0.3),
        both=_config(["gdpo", "gspo"], beta=0.01),
        needs="\n".join(f"  - `{need}`: {words}" for need, words in NEEDS.items()),
        grades="\n".join(f"  - `{grade}`: {words}" for grade, words in GRADES.items()),
        family=_rows(["recipe", "what it changes", "sets", "needs", "grade", "source"], family),
        everywhere=len(RECIPES) - len(elsewhere),
        elsewhere=_rows(["recipe", *GIVES, "why not"], elsewhere),
        sections="\n\n".join(map(section, recipes)),
    )


def section(recipe: Recipe) -> str:
    """What the page says of one recipe."""
    parts = [f"## {recipe.name}", _flowed(recipe.summary[0].upper() + recipe.summary[1:] + ".")]
    parts.append(f"```text\n{_equation(recipe)}\n```")
    facts = [f"Source: {_linked(recipe.source)}.", f"Grade {recipe.grade}: {_grade(recipe)}."]
    facts += [f"Sets {_code(_sets(recipe))}."] if recipe.sets else []
    facts += [f"Needs {_needs(recipe)}."] if _needs(recipe) else []
    parts += [_flowed(" ".join(facts)), f"```yaml\n{_config([recipe.name])}\n```"]
    changed = (option for option in options(recipe) if option.changed)
    together = [(said, list(run)) for said, run in groupby(changed, key=lambda option: option.meaning)]
    lines = [f"- {', '.join(f'`{option}` ({option.allowed})' for option in run)}: {said}." for said, run in together]
    return "\n\n".join(parts + ["\n".join(_flowed(line, "  ") for line in lines)] * bool(lines))


def _reasons(found: Iterable[str]) -> str:
    """Each once, without those that another one includes."""
    told = dict.fromkeys(found)
    return "; ".join(one for one in told if not any(one != other and one in other for other in told))


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flowed(text: str, margin: str = "") -> str:
    """Text in lines, none of which begins with what Markdown takes for a list, a quotation or a heading."""
    held = re.sub(r" (?=[-+*>#=|]|\d+[.)] )", "\0", text)
    return _filled(held, PAGE_WIDTH, "", margin).replace("\0", " ")


def _filled(text: str, width: int, first: str, then: str) -> str:
    return TextWrapper(width, first, then, break_long_words=False, break_on_hyphens=False).fill(text)


def _linked(source: str) -> str:
    return ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", source)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def _words(names: Iterable[str]) -> str:
    return " ".join(names) or "-"


def _grade(recipe: Recipe) -> str:
    return "; ".join(GRADES[grade] for grade in dict.fromkeys(recipe.grade.split("/")))


def _components(recipe: Recipe) -> dict[str, str]:
    """{option: the reward component it names}."""
    return {option: recipe.options[option] for option in COMPONENTS if option in recipe.options}


def _sets(recipe: Recipe) -> list[str]:
    """The slots it sets, without those that its loss_fn replaces."""
    return [slot for slot in recipe.sets if not recipe.loss_fn or slot not in LOSS_SLOTS]


def _asked(recipe: Recipe) -> list[str]:
    return [*sorted(recipe.all_needs), *(f"reward:{name}" for name in _components(recipe).values())]


def _needs(recipe: Recipe) -> str:
    named = [f"a reward component `{name}` (or what `{option}` names)" for option, name in _components(recipe).items()]
    return "; ".join([*(words for need, words in NEEDS.items() if need in recipe.all_needs), *named])


def _equation(recipe: Recipe) -> str:
    return recipe.equation.replace(";  ", "\n")


def _config(names: Sequence[str], **options: Any) -> str:
    chosen = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
    return f"objective: {{{', '.join(f'{name}: {value}' for name, value in {'recipe': chosen, **options}.items())}}}"
