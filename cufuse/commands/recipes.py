"""``cufuse recipes``: the named recipes, or the rounding points of some."""

import argparse
from typing import Any

from cufuse import named_recipes


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or print every rounding point of some",
        description="Without a name: every recipe in a line. With names: their rounding points and sums, step by step.",
    )
    parser.add_argument("name", nargs="*", help="recipes to print in full, such as torch")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    if given.name:
        print("\n\n".join(str(recipe) for recipe in map(named_recipes.get, given.name)))
        return
    width = max(map(len, named_recipes.RECIPES))
    for name, recipe in named_recipes.RECIPES.items():
        print(f"{name:{width}}  {recipe.summary}")
