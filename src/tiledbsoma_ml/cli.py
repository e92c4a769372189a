"""The command line, `tiledbsoma-ml …`: a table of contents. It needs the extra `cli`.

A command is a function in a module of `_cli`; both have the name of the command. That module and the packages
of the extra are imported when the command line is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer

__all__ = ["COMMANDS", "build_app", "main"]

COMMANDS = ("demo", "plan")
"""Names of the commands, in the order in which `--help` lists them."""

EXTRA = ("anndata", "h5py", "matplotlib", "rich", "typer")
"""Packages of the extra `cli`."""


def main() -> None:
    """Run the command line.

    Raises:
        ImportError: If the extra `cli` is not installed.
    """
    build_app()()


def build_app() -> "typer.Typer":
    """Return the command line as a Typer application."""
    _check_extra()
    import typer

    app = typer.Typer(
        name="tiledbsoma-ml",
        help="From a TileDB-SOMA query to training mini-batches.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    _add_version(app)
    for name in COMMANDS:
        app.command()(getattr(import_module(f"tiledbsoma_ml._cli.{name}"), name))
    return app


def _check_extra() -> None:
    for name in EXTRA:
        try:
            import_module(name)
        except ImportError as err:
            raise ImportError(
                f"the command line needs {err.name}; install it with: pip install 'tiledbsoma-ml[cli]'"
            ) from err


def _add_version(app: "typer.Typer") -> None:
    import typer

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"tiledbsoma-ml {version('tiledbsoma-ml')}")
            raise typer.Exit

    @app.callback(epilog="Start with `tiledbsoma-ml demo`.")
    def tiledbsoma_ml(
        show_version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass
