"""Errors of the command line: one sentence, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tiledbsoma as soma
import typer
from rich.console import Console
from rich.text import Text


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn an error that tells the user what to change into one sentence and exit code 2."""
    try:
        yield
    except (ValueError, OSError, soma.SOMAError) as err:
        raise refusal(str(err)) from err


def refusal(sentence: str) -> typer.Exit:
    """Print a sentence as an error; return the exception that ends the command with exit code 2."""
    Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), sentence), soft_wrap=True)
    return typer.Exit(2)
