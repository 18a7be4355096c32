"""The command line: one verb per file. Human text goes to stderr, results (--json) to stdout."""

import sys
from typing import Annotated

import typer

from octomoe.cli.bench import app as bench
from octomoe.cli.convert import convert
from octomoe.cli.demo import demo
from octomoe.cli.doctor import doctor
from octomoe.cli.eval import evaluate
from octomoe.cli.inspect import inspect
from octomoe.cli.tune import tune
from octomoe.cli.verify import verify
from octomoe.version import VERSION

app = typer.Typer(
    help="FP8 mixture-of-experts: convert checkpoints to it, verify and inspect them, see what "
    "quantised experts cost, and what this machine can run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """What every verb takes."""


app.command()(demo)
app.command()(convert)
app.command()(verify)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(doctor)
app.command()(tune)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line; refusals are one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        print(f"octomoe: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
