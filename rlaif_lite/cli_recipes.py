"""`rlaif-lite recipes`: list, explain and check recipes."""

import json
from typing import Annotated

import typer

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to set, such as ppo.kl_coef=0.05.")
]

recipes_app = typer.Typer(no_args_is_help=True, help="List, explain and check recipes.")


@recipes_app.command("list")
def recipes_list() -> None:
    """The recipes at hand, each with the first line of its comment."""
    from .recipe.file import recipe_folders

    for folder in recipe_folders():
        for path in sorted(folder.glob("*.yaml")):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            typer.echo(f"{str(path):<40}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


@recipes_app.command("show")
def recipes_show(key: Annotated[str, typer.Argument(help="Only this key or section, such as ppo.")] = "") -> None:
    """Every key of a recipe with its default, help and range."""
    from .recipe import show_fields

    typer.echo(show_fields(key))


@recipes_app.command("schema")
def recipes_schema() -> None:
    """The JSON schema, for editors that complete and check as one types."""
    from .recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@recipes_app.command("check")
def recipes_check(
    path: RecipePath,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--print", help="Print the recipe with all defaults filled in.")] = False,
) -> None:
    """Check a recipe, and that the files it names are there, without running it."""
    from .recipe import check_files, dump_yaml, load_recipe, recipe_hash

    recipe = load_recipe(path, overrides or [])
    check_files(recipe)
    if resolved:
        typer.echo(dump_yaml(recipe), nl=False)
    else:
        typer.echo(f"{path} is fine: hash {recipe_hash(recipe)}, runs into {recipe.output}.")
