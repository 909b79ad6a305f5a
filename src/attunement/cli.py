"""The command `attune`. Everything heavy is imported by the command that needs it, so that help comes at once."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attunement.errors import AttunementError, nearest

app = typer.Typer(
    name="attune",
    help="Adapt pretrained PyTorch models: look, train, ask, merge, export. Start with [bold]attune demo[/].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/banking.")]


@app.command(rich_help_panel="Start here")
def demo(
    method: Annotated[str, typer.Option(help="The method to adapt with; see [bold]attune methods[/].")] = "lora",
    epochs: Annotated[float, typer.Option(help="Passes over the 10,003 training questions.")] = 1.0,
    out: Annotated[Path, typer.Option(help="The folder for adapter, figures and picture.")] = Path("runs/demo"),
) -> None:
    """Teach MiniLM the 77 intents of banking77, then ask it five questions: about two minutes, no network, no GPU."""
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
) -> None:
    """Show a model as a tree of blocks, roles, shapes and parameters: what a selection can name."""
    import attunement as at
    from attunement.train.inspecting import empty, sites, sites_of

    shell = empty(model)
    if method is None:
        chosen = dict.fromkeys(sites(shell, on), "●") if on else {}
        console.print(at.anatomy(shell).tree(chosen))
        return
    anatomy = at.anatomy(shell)
    adapter = at.adapt(shell, at.method(method)(), on=on)
    console.print(anatomy.tree(sites_of(adapter)))
    share = adapter.count() / sum(p.numel() for p in shell.parameters())
    console.print(f"{adapter.count():,} trainable parameters, {share:.2%} of the model", highlight=False)


@app.command(rich_help_panel="Start here")
def methods(
    pattern: Annotated[str, typer.Argument(help="A glob over family/name, such as 'low_rank/*'.")] = "*",
) -> None:
    """List the methods: what each does, in a line, and where it comes from."""
    import attunement as at

    names = at.methods(pattern) or at.methods(f"*/{pattern}") or at.methods(f"*{pattern}*")
    if not names:
        raise AttunementError(f"methods: none matches {pattern!r}{nearest(pattern, at.methods())}")
    table = Table(
        "method", "what it does", "source", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for name in names:
        found = at.method(name)
        family, _, last = name.partition("/")
        line = Text((found.__doc__ or "").strip().split("\n")[0])
        table.add_row(Text.assemble((f"{family}/", "dim"), (last, "bold cyan")), line, Text(found.source, style="dim"))
    console.print(table)


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

    described = load(recipe, overrides or [])
    first = os.environ.get("RANK", "0") == "0"
    shown = console if first else Console(quiet=True)
    try:
        metrics = train_run(described, shown, resume, overwrite)
    except KeyboardInterrupt as stopped:
        command = shlex.join(["attune", "train", str(recipe), *(overrides or []), "--resume"])
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
        console.print(
            f"Saved in [bold]{described.output}[/]. Ask it: [bold]attune predict {described.output} TEXT[/]",
            highlight=False,
        )


@app.command("eval", rich_help_panel="Use")
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="A file or split to evaluate on; the recipe's test or eval rows otherwise.")
    ] = None,
) -> None:
    """Evaluate a trained adapter."""
    from attunement.train.run import evaluate_folder

    show_metrics(evaluate_folder(run, data))


@app.command(rich_help_panel="Use")
def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to ask; images by path.")] = None,
    file: Annotated[str | None, typer.Option(help="Ask every row of a CSV, JSON-lines or Parquet file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers as JSON lines here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Ask a trained adapter, text by text or a whole file."""
    from attunement.train.run import predict_folder

    if bool(texts) == bool(file):
        raise AttunementError("predict: expected either texts or --file, got " + ("both" if texts else "neither"))
    asked, answers = predict_folder(run, texts, file)
    lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
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
    run: RunFolder, out: Annotated[Path, typer.Option(help="The folder for the merged model.")] = Path("merged")
) -> None:
    """Write the adapted model as one ordinary model without adapters: the same as export --to merged."""
    from attunement.train.run import export_folder

    console.print(export_folder(run, "merged", out), highlight=False)


@app.command(rich_help_panel="Use")
def export(
    run: RunFolder,
    to: Annotated[
        str,
        typer.Option(help="peft: PEFT's files. lora: a plain LoRA in PEFT's files, for servers. merged: one model."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("export"),
    rank: Annotated[
        int | None, typer.Option(help="The rank of the LoRA that --to lora makes; by default the method's own.")
    ] = None,
) -> None:
    """Write a trained adapter for other programs."""
    from attunement.train.run import export_folder

    console.print(export_folder(run, to, out, rank), highlight=False)


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


def answer_table(asked: list[str], answers: list[dict[str, Any]]) -> Table:
    """A row for each question with its answer."""
    table = Table("asked", *answers[0], box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for question, answer in zip(asked, answers, strict=True):
        cells = [f"{v:.3f}" if isinstance(v, float) else v for v in answer.values()]
        table.add_row(
            Text(question), Text(cells[0], style="bold cyan"), *[Text(cell, style="dim") for cell in cells[1:]]
        )
    return table


def main() -> None:
    """Run the command; a refusal is one red sentence and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels when it is imported
    try:
        app()
    except AttunementError as error:
        errors.print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(2)
