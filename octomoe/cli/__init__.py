"""The command line: one verb per file. Human text goes to stderr, results (--json) to stdout."""

import sys

import typer

from octomoe.cli.demo import demo
from octomoe.cli.doctor import doctor

app = typer.Typer(
    help="FP8 mixture-of-experts: quantise, compare, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(doctor)


def main() -> None:
    """Run the command line; refusals are one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        print(f"octomoe: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
