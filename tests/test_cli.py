from __future__ import annotations

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from tiledbsoma_ml import __version__, cli


def run(*arguments: object) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it printed."""
    result = CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def run_process(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )


# Commands -------------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version") == (0, f"tiledbsoma-ml {__version__}\n")


def test_help_lists_the_commands_in_their_order() -> None:
    code, output = run("--help")
    assert code == 0
    assert re.findall(r"^│ (\w+) ", output.partition("Commands")[2], flags=re.MULTILINE) == [*cli.COMMANDS]


def test_a_command_is_a_module_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tiledbsoma_ml._cli.greet")
    exec("def greet(whom: str = 'world') -> None:\n    print(f'hello {whom}')", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, "greet"))
    assert run("greet", "--whom", "cells") == (0, "hello cells\n")


# The extra ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib", "h5py", "anndata"])
def test_a_missing_extra_is_named_with_the_line_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'tiledbsoma-ml[cli]'")) as caught:
        cli.main()
    assert f"the command line needs {package}" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_without_the_extra_the_command_ends_with_the_line_that_installs_it() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'matplotlib']))"
    done = run_process(f"{block}; from tiledbsoma_ml.cli import main; main()", "demo")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: the command line needs matplotlib; install it with: pip install 'tiledbsoma-ml[cli]'"
    )
