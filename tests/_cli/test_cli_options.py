"""The command line and the Python interface have the same names and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from torch.utils.data import DataLoader

from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._cli.options import as_size
from tiledbsoma_ml.cli import COMMANDS, build_app

ExperimentDataModule = pytest.importorskip("tiledbsoma_ml.data_module").ExperimentDataModule


def parameters_and_options() -> Iterator[tuple[str, Any, Any]]:
    """Yield each command, its options that set a parameter, and the default of that parameter."""
    # A parameter that several of these have is that of the data module, which is for training.
    signatures = [inspect.signature(owner) for owner in (ExperimentDataModule, ExperimentDataset, DataLoader)]
    app: Any = typer.main.get_command(build_app())
    for command in COMMANDS:
        for option in app.commands[command].params:
            found = [s.parameters[option.name] for s in signatures if option.name in s.parameters]
            if found:
                yield command, option, found[0].default


FOUND = [*parameters_and_options()]


@pytest.mark.parametrize(
    ("option", "default"), [found[1:] for found in FOUND], ids=[f"{c}, {o.name}" for c, o, _ in FOUND]
)
def test_an_option_has_the_name_and_the_default_of_the_parameter_that_it_sets(
    option: Any, default: Any
) -> None:
    assert option.opts == [f"--{option.name.replace('_', '-')}"]
    assert str(option.default) == str(default)


def test_the_options_that_set_a_parameter_are_found() -> None:
    found = {(command, option.name) for command, option, _ in FOUND}
    for name in ("layer_name", "batch_size", "num_workers", "seed"):
        assert {("demo", name), ("plan", name)} <= found


@pytest.mark.parametrize(("text", "size"), [("64", 64), ("-1", -1), ("auto", "auto"), ("1e3", "1e3")])
def test_a_size_is_a_number_or_what_a_dataset_refuses(text: str, size: int | str) -> None:
    assert as_size(text) == size
