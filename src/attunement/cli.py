"""The command `attune`. Everything heavy is imported by the command that needs it, so that help comes at once."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attunement.compare.command import compare
from attunement.compare.recommend import recommend
from attunement.errors import AttunementError, nearest

app = typer.Typer(
    name="attune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/banking.")]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="A module or own.py that registers methods; may be given again."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"attune {version('attunement')}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Adapt pretrained PyTorch models: look, train, ask, merge, export. Start with [bold]attune demo[/]."""


@app.command(rich_help_panel="Start here")
def demo(
    method: Annotated[str, typer.Option(help="The method to adapt with; see [bold]attune methods[/].")] = "lora",
    epochs: Annotated[float, typer.Option(help="Passes over the 10,003 training questions.")] = 1.0,
    out: Annotated[Path, typer.Option(help="The folder for adapter, figures and picture.")] = Path("runs/demo"),
) -> None:
    """Teach MiniLM the 77 intents of banking77, then ask it five questions: a few minutes, no network, no GPU."""
    from attunement.train.demo import run

    run(console, method, epochs, out)


@app.command(rich_help_panel="Start here")
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder or a hub id; only its configuration is read.")
    ],
    on: Annotated[str | None, typer.Option(help="Mark these sites, such as 'attention.{query,value}'.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Mark where this method would act, and count what it trains.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Show a model as a tree of blocks, roles, shapes and parameters: what a selection can name."""
    import attunement as at
    from attunement.train.inspecting import empty, sites, sites_of

    imported(imports)
    shell = empty(model)
    if method is None:
        chosen = dict.fromkeys(sites(shell, on), "●") if on else {}
        console.print(at.anatomy(shell).tree(chosen, console.width))
        return
    anatomy = at.anatomy(shell)
    adapter = at.adapt(shell, at.method(method)(), on=on)
    console.print(anatomy.tree(sites_of(adapter), console.width))
    share = adapter.count() / sum(p.numel() for p in shell.parameters())
    console.print(f"{adapter.count():,} trainable parameters, {share:.2%} of the model", highlight=False)


@app.command(rich_help_panel="Start here")
def methods(
    pattern: Annotated[
        str, typer.Argument(metavar="[NAME]", help="A method, or a glob over family/name such as 'low_rank/*'.")
    ] = "*",
    imports: Imports = None,
) -> None:
    """List the methods; with the name of one, its formula, fields, defaults and source."""
    import attunement as at

    imported(imports)
    last = {name: name.partition("/")[2] for name in at.methods()}
    named = [name for name in last if pattern.casefold() in (name, last[name], at.method(name).__name__.casefold())]
    names = named or at.methods(pattern) or at.methods(f"*/{pattern}") or at.methods(f"*{pattern}*")
    if not names:
        raise AttunementError(f"methods: none matches {pattern!r}{nearest(pattern, [*last, *last.values()])}")
    if named and len(names) == 1:
        console.print(method_card(at.method(names[0])))
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in names:
        found = at.method(name)
        family, _, word = name.partition("/")
        line = Text(" ".join((found.__doc__ or "").strip().split("\n\n")[0].split()))
        table.add_row(Text.assemble((f"{family}/", "dim"), (word, "bold cyan")), line)
    console.print(table)
    console.print(Text(f"{len(names)} methods; attune methods NAME shows the fields of one", style="dim"))


def method_card(found: type[Any]) -> Group:
    """A method in full: what it does, its fields, where it acts, what it cannot do, where it comes from."""
    fields = Table("field", "kind", "default", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name, field in found.__pydantic_fields__.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"{default:g}" if isinstance(default, float) else repr(default)
        fields.add_row(Text(name, style="cyan"), Text(kind_of(field.annotation, field.metadata)), Text(shown))
    facts = Table.grid(padding=(0, 2, 0, 0))
    required = any(field.is_required() for field in found.__pydantic_fields__.values())
    said = found if required else found()  # what depends on the fields is told of their defaults
    placement = said.placement
    if isinstance(placement, str):
        facts.add_row(Text("acts on", style="bold"), Text(f"{placement}, unless `on` says otherwise"))
    elif doc := (placement.__doc__ or "").strip():
        facts.add_row(Text("acts on", style="bold"), Text(doc.split("\n")[0].rstrip(".").lower()))
    for word, reason in (said.cannot if isinstance(said.cannot, Mapping) else {}).items():
        facts.add_row(Text(f"no {word}", style="bold"), Text(reason))
    facts.add_row(Text("source", style="bold"), Text(found.source, overflow="fold"))
    lines = [Padding(Text(line.strip()), (0, 0, 0, len(line) - len(line.lstrip()))) for line in unfolded(found.__doc__)]
    shown_fields = fields if fields.row_count else Text("It has no fields.")
    return Group(Text(found.name, style="bold cyan"), "", *lines, "", shown_fields, "", facts)


def unfolded(doc: str | None) -> list[str]:
    """The lines of a docstring with those of a paragraph, or of an entry and what is indented below it, joined."""
    import inspect as inspecting

    lines: list[str] = []
    for line in inspecting.cleandoc(doc or "").split("\n"):
        before = lines[-1] if lines else ""
        depth, above = (len(text) - len(text.lstrip()) for text in (line, before))
        goes_on = line and before and not before.endswith(":") and (depth > above or depth == above == 0)
        lines = [*lines[:-1], f"{before} {line.strip()}"] if goes_on else [*lines, line]
    return lines


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The type of a field as a person writes it: `int > 0, or None`."""
    metadata = [*metadata, *getattr(annotation, "__metadata__", ())]
    annotation = getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return ", or ".join(kind_of(one, metadata) for one in arguments)
    if annotation is type(None):
        return "None"
    if origin is tuple:
        each = [kind_of(one) for one in arguments if one is not Ellipsis]
        return f"tuple of {each[0]}" if Ellipsis in arguments else f"({', '.join(each)})"
    if origin is dict:
        return f"dict of {kind_of(arguments[0])} to {kind_of(arguments[1])}"
    name = str(annotation).replace("typing.", "") if arguments else getattr(annotation, "__name__", str(annotation))
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
    bounds = [f"{sign} {getattr(one, key):g}" for one in metadata for key, sign in signs.items() if hasattr(one, key)]
    return f"{name} {' and '.join(bounds)}" if bounds else name


def imported(names: list[str] | None) -> None:
    """Import what --import names."""
    if names:
        from attunement.train.recipe import import_all

        import_all(names, "--import")


@app.command(rich_help_panel="Train")
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; [bold]attune schema[/] describes it.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Change the recipe: training.learning_rate=5e-4."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the folder holds a run.")] = False,
) -> None:
    """Train an adapter as a recipe says.

    On several devices or machines: [bold]torchrun --nproc-per-node 8 -m attunement train RECIPE.yaml[/], or
    [bold]accelerate launch -m attunement train RECIPE.yaml[/] for FSDP2 and DeepSpeed.
    """
    from attunement.train.progress import Interrupted
    from attunement.train.recipe import load
    from attunement.train.run import train as train_run
    from attunement.train.trainer import last_checkpoint
    from attunement.train.words import command as called
    from attunement.train.words import near, not_alone

    not_alone("train")
    described = load(recipe, overrides or [])
    first = os.environ.get("RANK", "0") == "0"
    shown = console if first else Console(quiet=True)
    try:
        metrics = train_run(described, shown, resume, overwrite)
    except KeyboardInterrupt as stopped:
        command = f"{called()} {shlex.join(['train', str(recipe), *(overrides or []), '--resume'])}"
        if isinstance(stopped, Interrupted):
            said = "Stopped and saved. Go on with: "
        elif last_checkpoint(Path(str(described.output))) is not None:
            said = "Stopped. Go on from the last checkpoint with: "
        else:
            said, command = "Stopped before there was a checkpoint.", ""
        shown.print(Text.assemble(f"\n{said}", (command, "bold")), soft_wrap=True)
        raise typer.Exit(130) from None
    if first:
        show_metrics(metrics)
        question = "IMAGE" if described.task.lazy else "TEXT"
        ask = f"{called()} predict {shlex.quote(str(described.output))} {question}"
        named = "".join(f" --import {shlex.quote(near(name))}" for name in described.imports)
        done = Text.assemble("Saved in ", (str(described.output), "bold"), "; ask it: ", (ask + named, "bold"))
        console.print(done, soft_wrap=True)


@app.command("eval", rich_help_panel="Use")
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to evaluate on: the run's own train, eval or test rows, a split of its source, or a file. "
            "Its test rows by default, or else its eval rows."
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Evaluate a trained adapter."""
    from attunement.train.run import evaluate_folder

    show_metrics(evaluate_folder(run, data, imports))


@app.command(rich_help_panel="Use")
def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to ask; images by path.")] = None,
    file: Annotated[str | None, typer.Option(help="Ask every row of a CSV, JSON-lines or Parquet file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers as JSON lines here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    imports: Imports = None,
) -> None:
    """Ask a trained adapter, text by text or a whole file."""
    from attunement.train.run import check_place, predict_folder

    if bool(texts) == bool(file):
        raise AttunementError("predict: expected either texts or --file, got " + ("both" if texts else "neither"))
    if out is not None:
        if out.is_dir():
            raise AttunementError(f"predict: --out {out} is a folder; give a file")
        check_place(out.parent, "predict: --out")
    asked, answers = predict_folder(run, texts, file, imports)
    lines = [json.dumps(row | answer, ensure_ascii=False) for row, answer in zip(asked, answers, strict=True)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        console.print(f"{len(lines)} answers in [bold]{out}[/]")
    elif as_json:
        sys.stdout.write("\n".join(lines) + "\n")
    else:
        console.print(answer_table(asked, answers))


@app.command(rich_help_panel="Use")
def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the merged model.")],
    imports: Imports = None,
) -> None:
    """Write the adapted model as one ordinary model without adapters: the same as export --to merged."""
    from attunement.train.run import export_folder

    console.print(export_folder(run, "merged", out, imports=imports), highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel="Use")
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(help="peft: PEFT's files. lora: a plain LoRA in PEFT's files, for servers. merged: one model."),
    ],
    rank: Annotated[
        int | None, typer.Option(help="The rank of the LoRA that --to lora makes; by default the method's own.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Write a trained adapter for other programs."""
    from attunement.train.run import export_folder

    console.print(export_folder(run, to, out, rank, imports), highlight=False, markup=False, soft_wrap=True)


app.command(rich_help_panel="Compare")(compare)
app.command(rich_help_panel="Compare")(recommend)


@app.command(rich_help_panel="Train")
def schema() -> None:
    """Print the JSON schema of recipe files, for editors: attune schema > recipe.schema.json."""
    from attunement.train.recipe import schema as made

    sys.stdout.write(json.dumps(made(), indent=2) + "\n")


def show_metrics(metrics: dict[str, dict[str, float]]) -> None:
    """A row for each split."""
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    table = Table("rows", *names, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for split, row in metrics.items():
        table.add_row(split, *[f"{row[name]:.4f}" if name in row else "" for name in names])
    console.print(table)


def answer_table(asked: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Table:
    """A row for each question with its answer; figures are never cut, words are folded."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("asked", overflow="fold")
    for i, (name, value) in enumerate(answers[0].items() if answers else ()):
        figure = isinstance(value, float)
        table.add_column(name, style="dim" if i else "bold cyan", overflow="fold", no_wrap=figure)
    for row, answer in zip(asked, answers, strict=True):
        question = " / ".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in row.values())
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in answer.values()]
        table.add_row(Text(question), *map(Text, cells))
    return table


def main() -> None:
    """Run the command; a refusal is one red sentence and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels when it is imported
    try:
        app()
    except AttunementError as error:
        errors.print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(2)
