"""The command line: `rlaif-lite run recipes/tiny.yaml` and what belongs around it.

Heavy modules (torch, transformers) are imported inside the commands that need them, so that `--help` answers at once.
Errors that the input causes are printed as they are, with exit code 2; anything else keeps its traceback.
"""

import json
import os
import signal
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from . import __version__
from .cli_recipes import Overrides, RecipePath, recipes_app
from .errors import RlaifError


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is, so that the same clean-up runs."""


class _Group(TyperGroup):
    """Turns what ends a command early into a message and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except RlaifError as error:
            typer.echo(f"{error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            resumable = ctx.invoked_subcommand in ("run", "sweep", "bench")
            how = "; what is done is kept: run the same command again" if resumable else ""
            typer.echo(f"\nStopped{how}.", err=True)
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Align a video language model by its own feedback, on one GPU (or, small, on a CPU).",
)
app.add_typer(recipes_app, name="recipes")

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]
Launcher = Literal["local", "submitit"]
TOGETHER = ("run", "eval", "profile")  # commands that several ranks do together
BestOf = Annotated[
    int | None, typer.Option(min=2, help="Also the policy's best of so many answers, by its own implicit reward.")
]


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    from . import ranks

    if ctx.invoked_subcommand not in TOGETHER:
        ranks.refuse_several(f"`rlaif-lite {ctx.invoked_subcommand}`")


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage, such as preference.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Start even what cannot fit into memory.")] = False,
) -> None:
    """Run a recipe, or go on where it stopped. Finished stages whose inputs are unchanged are skipped.

    On several GPUs: `torchrun --nproc-per-node 2 -m rlaif_lite run RECIPE`."""
    from . import ranks
    from .recipe import check_files, load_recipe

    with ranks.joined():
        loaded = load_recipe(recipe, overrides or [])
        check_files(loaded)
        from .model.unsloth_loader import import_first

        import_first(loaded.model)
        from . import pipeline

        pipeline.run(loaded, until=until, force=force)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="A card that is not here, such as 24GB or 80GiB.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many such cards share the work, one rank on each.")] = 1,
    link: Annotated[str, typer.Option(help="What joins them: nvlink, pcie or 100gb.")] = "pcie",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a run will take of memory, disk and time, stage by stage. Exit code 1 where it does not fit."""
    from .recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # before anything heavy: an error in it is shown at once
    from rich.console import Console

    from . import pipeline, planner  # a run holds in memory what `pipeline` imports

    found = pipeline.make_plan(loaded, gpu, gpus, link)
    if as_json:
        typer.echo(json.dumps(planner.as_json(found), indent=2))
    else:
        Console(width=None if os.isatty(1) else 150).print(planner.as_table(found))
        typer.echo("\n".join(planner.advice(found)))
    if not found.fits:
        raise typer.Exit(1)


@app.command("data")
def show_data(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Data files, or folders of `datasets`.")],
    recipe: Annotated[str | None, typer.Option(help="Count and show tokens as this recipe's base reads them.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, where no recipe or another one is meant.")] = None,
    video_root: Annotated[Path | None, typer.Option(help="Folder that video paths start from.")] = None,
) -> None:
    """Show what data files are read as: format, counts, lengths, missing videos, the first records."""
    from . import data_report

    typer.echo(data_report.report_on(files, recipe, base, video_root))


@app.command("eval")
def evaluate(run_dir: RunDir, best_of: BestOf = None) -> None:
    """Evaluate a run's roles again on its held-out videos."""
    from . import ranks

    with ranks.joined():
        _need_base(run_dir)
        from . import pipeline

        pipeline.evaluate_again(run_dir, best_of)


@app.command()
def bench(
    run: Annotated[str | None, typer.Argument(metavar="RUN_DIR", help="A run; for --role base also a recipe.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The benchmark; --list shows them.")] = None,
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="Its files, as shipped.")] = None,
    videos: Annotated[Path | None, typer.Option(help="The folder with its videos or pictures, at any depth.")] = None,
    role: Annotated[str, typer.Option(help="The role that is tested: base, sft, reference or policy.")] = "policy",
    judge: Annotated[str, typer.Option(help="local, rules, or the URL of an OpenAI-compatible endpoint.")] = "local",
    judge_model: Annotated[
        str | None, typer.Option(help="Its model: a name there; a folder or hub id if local.")
    ] = None,
    judge_words: Annotated[
        bool, typer.Option("--judge-words", help="local: yes or no by their probabilities, without a score.")
    ] = False,
    judge_key: Annotated[str | None, typer.Option(metavar="VARIABLE", help="Variable with the endpoint's key.")] = None,
    judge_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="Settings of its requests; null leaves one of ours out.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once to an endpoint.")] = 8,
    price: Annotated[tuple[float, float] | None, typer.Option(help="Of a million tokens, prompt and reply.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Ask once more for verdicts that could not be read.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N items.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The request; {question} is the item's question.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; else the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the results; else RUN_DIR/bench/NAME-ROLE.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the benchmarks, and the files they read.")] = False,
    table: Annotated[bool, typer.Option("--table", help="The arguments are such folders: show them together.")] = False,
) -> None:
    """Run a role on one of the field's benchmarks, from the authors' files; or show results side by side."""
    if run is not None and not (list_ or table):
        if Path(run).is_dir():
            _need_base(Path(run))
        else:
            _import_first(run)
    from .benchmarks import command

    if list_:
        typer.echo(command.listing())
    elif table:
        typer.echo(command.side_by_side([Path(each) for each in (run, name, *(files or [])) if each is not None]))
    elif run is None or name is None or not files or videos is None:
        raise RlaifError("Give a run, a benchmark, its files and --videos; `rlaif-lite bench --list` names them.")
    else:
        asked = command.Judging(judge, judge_model, judge_words, judge_key, judge_body, concurrency, price, again)
        typer.echo(command.bench(run, name, files, videos, role, asked, out, limit, prompt, max_new_tokens))


@app.command()
def report(run_dir: RunDir) -> None:
    """Write a run's report.html again and print its path."""
    _need_run(run_dir)
    from .report import page

    typer.echo(page.write(run_dir))


@app.command()
def across(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Finished runs.")],
    out: Annotated[Path | None, typer.Option(help="Write OUT.md and OUT.json instead of printing.")] = None,
) -> None:
    """Several runs side by side: mean, spread, and each run's figures."""
    from .report.across import table

    markdown, figures = table(run_dirs)
    if out is None:
        typer.echo(markdown)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(markdown, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@app.command()
def sweep(
    what: Annotated[
        list[str], typer.Argument(metavar="RECIPE... KEY=VALUE...", help="Recipes, and keys to set in every point.")
    ],
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=[VALUES]", help="A key and its values; `a,b=[...]` for keys that go together."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Its folder; runs/sweep-NAME without it.")] = None,
    launcher: Annotated[Launcher, typer.Option(help="local: this machine; submitit: a SLURM cluster.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="local: points side by side, each on a card of its own.")] = 1,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="submitit: YAML with partition, gpus, hours, ...")
    ] = None,
) -> None:
    """Run a grid of recipes and values, shared stages once; a table and plots with intervals.

    Go on with the same command. Exit code 1 where a point failed; the others went on."""
    from .sweep import sweep as run_grid

    recipes = [word for word in what if "=" not in word]
    if not recipes:
        raise RlaifError("A sweep needs a recipe, such as `rlaif-lite sweep recipes/tiny.yaml --over 'seed=[0,1,2]'`.")
    folder = out or Path("runs") / f"sweep-{'-'.join(Path(path).stem for path in recipes)}"
    if not run_grid(recipes, over or [], [word for word in what if "=" in word], folder, launcher, jobs, cluster):
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder, or one of benchmark results.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same held-out videos.")],
    role: Annotated[str | None, typer.Option(help="Whose answers: sft, sft@0.3, ...; else what each trained.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What changed between two runs or benchmark results, and whether it is more than noise."""
    from .report import compare as module

    found = module.compare(a, b, role)
    typer.echo(json.dumps(module.as_json(found), indent=2) if as_json else module.as_text(found))


@app.command()
def chat(
    run_dir: RunDir,
    video: Annotated[Path, typer.Argument(help="A video file, or a folder of frames.")],
    role: Annotated[str, typer.Option(help="Who answers: base, sft, reference or policy.")] = "policy",
    question: Annotated[str | None, typer.Option(help="One question; without it, questions are asked for.")] = None,
    best_of: BestOf = None,
) -> None:
    """Ask about a video file."""
    _need_base(run_dir)
    if not video.exists():
        raise RlaifError(f"There is no video {video}. Paths start at {Path.cwd()}.")
    from . import chat as chat_module

    chat_module.main(run_dir, str(video), role, question, best_of)


@app.command()
def ui(
    run_dir: RunDir,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Its port; else the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also a public address, through Gradio's servers.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what people decided as pairs for data.pairs, and end.")
    ] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="With --export: pairs on held-out videos too.")] = False,
) -> None:
    """Open a page on which people judge a run's answers, browse the judge's, and ask two roles side by side."""
    _need_base(run_dir)
    if export is not None:
        from .ui import store

        typer.echo(store.as_text(store.Store(run_dir).export(export, held_out), export))
        return
    from .ui import page

    page.serve(run_dir, host, port, share)


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there yet.")],
    role: Annotated[str, typer.Option(help="policy, sft, reference; reward or value (adapter and head).")] = "policy",
    push: Annotated[str | None, typer.Option(metavar="ID", help="A hub repository to upload the folder to.")] = None,
    check: Annotated[bool, typer.Option(help="Compare the merged model with the adapter on test prompts.")] = True,
) -> None:
    """Merge a run's role into bfloat16 weights that plain transformers loads, and write its model card."""
    _need_base(run_dir)
    from .exchange import export as exporter

    compared = exporter.export(run_dir, role, out, check, push)
    if compared is not None:
        typer.echo(exporter.comparison_text(compared))
    if role in exporter.SCALARS:
        typer.echo(f"Role {role} ends in a number; it cannot be merged into a causal LM: adapter and head.")
    else:
        typer.echo(f"To measure it: {exporter.lmms_command(out)}")
        ours = f"lmms-eval --model rlaif_lite --model_args run={run_dir},role={role} --tasks TASK"
        typer.echo(f"With the run's frames, pruning and quantisation: {ours}")
    typer.echo(f"{out}{'' if push is None else f', and https://huggingface.co/{push}'}")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A released checkpoint or adapter: a folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there yet.")],
    base: Annotated[str | None, typer.Option(help="For an adapter: the imported checkpoint it belongs to.")] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP's folder or hub id, where the checkpoint has no tower inside.")
    ] = None,
) -> None:
    """Convert a released LLaVA checkpoint to transformers' layout, or a LoRA checkpoint to a role's folder."""
    from .exchange import files, llava, lora

    folder = files.local_folder(source)
    if lora.adapter_folder(folder) is None:
        tower = None if vision_tower is None else files.local_folder(vision_tower)
        made = llava.import_llava(folder, out, tower)
        left = f"; left out, since they are computed:{files.listed(made.left_out)}" if made.left_out else ""
        typer.echo(f"{out}: {made.tensors} tensors, {made.bytes / 1e9:.2f} GB. Use it as `model.base`{left}")
        return
    if base is None:
        raise RlaifError(f"{source} is an adapter. Give the imported checkpoint it was trained on as --base.")
    adapter = lora.import_lora(folder, files.local_folder(base), out)
    head = ", and its head" if adapter.head else ""
    size = f"{adapter.parameters / 1e6:.1f} M parameters"
    typer.echo(f"{out}: {adapter.tensors} tensors of rank {adapter.rank}, {size}{head}.")


@app.command()
def profile(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped name.")] = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each phase, after one to warm up.")] = 2,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; may be given again.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Draw the base, download none.")] = False,
    small: Annotated[bool, typer.Option("--small", help="Random weights of two narrow layers, to rehearse.")] = False,
    memory_cap: Annotated[str | None, typer.Option(help="Bound the GPU memory, such as 24GB.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Write a Chrome trace and a picture of the memory.")] = False,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="Show two such files.")] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Shapes only, without a GPU: memory, launches, a roofline.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="With --dry: the card, such as h200, a100, 4090 or 3090.")] = "a100",
    layers: Annotated[int | None, typer.Option(min=1, help="With --dry: so many layers instead of all.")] = None,
) -> None:
    """Run each stage for a few steps on made-up inputs of the recipe's sizes; say what each phase costs."""
    if compare is not None:
        from .profiler.tables import compare as beside
        from .profiler.tables import read

        typer.echo(beside(*map(read, compare)))
        return
    if recipe is None:
        raise RlaifError("Give a recipe to profile, or two profiles to --compare.")
    from .recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry:
        from .dryrun.launch import dry_run

        raise typer.Exit(dry_run(recipe, overrides or [], gpu, stage or [], layers, trace, out))
    from . import ranks

    with ranks.joined():
        from .model.unsloth_loader import import_first

        import_first(loaded.model)
        from .profiler import command

        command.profile(loaded, steps, tuple(stage or ()), memory_cap, random_weights, small, trace, out)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Say what this machine can do. Exit code 1 where something that every run needs does not work."""
    from . import doctor as doctor_module

    findings = doctor_module.examine()
    typer.echo(json.dumps(findings, indent=2) if as_json else doctor_module.as_text(findings))
    if not findings["healthy"]:
        raise typer.Exit(1)


def _need_run(run_dir: Path) -> None:
    """Raises RlaifError unless a run has begun in `run_dir`."""
    if (run_dir / "recipe.yaml").is_file():
        return
    found = sorted(path.parent for path in (run_dir, Path("runs")) for path in path.glob("*/recipe.yaml"))
    hint = f"Runs at hand: {', '.join(map(str, found[:8]))}." if found else "Start one with `rlaif-lite run RECIPE`."
    raise RlaifError(f"{run_dir} is not a run folder: it holds no recipe.yaml. {hint}")


def _need_base(run_dir: Path) -> None:
    """For commands that load the run's base."""
    _need_run(run_dir)
    _import_first(run_dir / "recipe.yaml")


def _import_first(recipe: str | Path) -> None:
    """What the recipe's base needs to be imported before torch."""
    from .model.unsloth_loader import import_first
    from .recipe import load_recipe

    import_first(load_recipe(recipe).model)


def main() -> None:
    """Entry point of the `rlaif-lite` command."""
    main_process = os.getpid()

    def stop(signum, frame):
        if os.getpid() != main_process:  # a forked worker that its pool ends: no clean-up of ours
            os._exit(143)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    # Before torch starts OpenMP. Threads that wait for another look for it a short while, then sleep: without that
    # while a second thread gains nothing, and a long one burns cores that others need (docs/profiling.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app()


if __name__ == "__main__":
    main()
