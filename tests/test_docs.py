"""What README.md and the pages of docs/ show works: their code runs, their links lead somewhere.

A page's Python blocks run one after the other, in one process, in a folder that holds `cells.soma` and
`cells.h5ad`: simulated cells, with a column "tissue" added. Comments, which no reader sees, add to it:

    <!-- run               code of a test, at this place
    assert …
    -->
    <!-- not run: why -->  before a block that cannot run here

A block with the address of a store in the cloud is not run either. What is not run is compiled, and its calls
are bound to the signatures of what they call. Commands in `sh` blocks are parsed by what they call.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import typer

import tiledbsoma_ml
from scripts import is_installed
from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._ingest.experiment import write_cells
from tiledbsoma_ml.cli import build_app
from tiledbsoma_ml.simulate import simulate_cells

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
IGNORED = ("_build", "_generated", "notebooks")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in IGNORED),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXTRAS = ("lightning", "ray", "scvi", "torchdata")
CLOUD = ("s3://", "gs://", "azure://", "cellxgene_census")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Blocks ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Block:
    """Some code of a page.

    Attributes:
        code: Its text.
        line: Where in the page it begins.
        language: "python" or "sh".
        not_run: Why it does not run, if so.
    """

    code: str
    line: int
    language: str
    not_run: str | None

    @property
    def modules(self) -> set[str]:
        """What it imports, by the name of the package."""
        nodes = list(ast.walk(ast.parse(self.code)))
        sources = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        ours = {
            alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom) and node.module == "tiledbsoma_ml"
            for alias in node.names
        }
        needs = {"SCVIDataModule": "scvi", "ExperimentDataModule": "lightning", "RayTrainRunner": "ray"}
        return {name.partition(".")[0] for name in sources | names} | {needs[n] for n in ours & set(needs)}


_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>.*?) -->\n)?^```(?P<language>python|sh)\n(?P<code>.*?)^```$"
    r"|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)


def blocks_of(text: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        part = "hidden" if match["code"] is None else "code"
        code = match[part]
        cloud = next((word for word in CLOUD if word in code), None)
        why = match["why"] or (cloud and f"reads {cloud}…")
        line = text.count("\n", 0, match.start(part)) + 1
        yield Block(code, line, match["language"] or "python", why)


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cells of all pages."""
    folder = tmp_path_factory.mktemp("cells")
    adata = simulate_cells(n_cells=1_500, n_genes=200)
    adata.obs["tissue"] = np.where(np.arange(adata.n_obs) % 3 == 0, "blood", "lung")
    adata.write_h5ad(folder / "cells.h5ad")
    write_cells(str(folder / "cells.soma"), adata, var_id_name="feature_id")
    return folder


# Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, cells: Path, tmp_path: Path, run_script: Any) -> None:
    blocks = [block for block in blocks_of(page.read_text()) if block.language == "python"]
    missing = [
        (b.line, name) for b in blocks for name in EXTRAS if name in b.modules and not is_installed(name)
    ]
    if missing:
        blocks = [block for block in blocks if block.line < missing[0][0]]
    imported: dict[str, Any] = {}
    for block in blocks:
        check_calls(block, imported, name_of(page)) if block.not_run else run_imports(block, imported)
    shutil.copytree(cells, tmp_path, dirs_exist_ok=True)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # where snapshot=True puts a snapshot
    code, output = run_script(at_their_lines(blocks), name=str(page), folder=tmp_path, environment=cache)
    assert code == 0, output
    if missing:
        pytest.skip(f"from line {missing[0][0]} on, {missing[0][1]} is needed, which is not installed")


def at_their_lines(blocks: list[Block]) -> str:
    """Return the code that runs, each block at its line of the page, so that errors name that."""
    text = ""
    for block in blocks:
        if not block.not_run:
            text += "\n" * (block.line - 1 - text.count("\n")) + block.code
    return text


def test_only_a_few_blocks_do_not_run_and_say_why() -> None:
    whys = [(name_of(page), block.not_run) for page in PAGES for block in blocks_of(page.read_text())]
    not_run = [(page, why) for page, why in whys if why]
    assert len(not_run) <= 12
    assert all(len(why) > 8 for _, why in not_run)


def test_code_is_marked_as_what_it_is() -> None:
    """Code under another name, `py` or `bash`, would not be tested."""
    fences = {
        (name_of(page), language)
        for page in PAGES
        for language in re.findall(r"^```([^\n`]+)\n.*?^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        if not language.startswith("{")
    }
    assert {language for _, language in fences} <= {"python", "sh", "json", "toml", "text"}, fences


# What further keywords of a call are for.
FORWARDS: Mapping[str, Callable[..., Any]] = {
    "ExperimentDataModule": ExperimentDataset,
    "SCVIDataModule": ExperimentDataset,
    "experiment_dataloader": torch.utils.data.DataLoader,
}


def check_calls(block: Block, names: Mapping[str, Any], page: str) -> None:
    """Check that what code calls takes what it is called with, as far as imports tell what that is."""
    place = f"{page}:{block.line}"
    tree, found = ast.parse(block.code, place), dict(names)
    run_imports(block, found)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = _resolve(node.value.func, found)
            if inspect.isclass(made) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = Instance(made)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            _check_call(call, found, f"{place}, {ast.unparse(call.func)}")


def run_imports(block: Block, names: dict[str, Any]) -> None:
    """Import what a block imports, but for what belongs to no package."""
    for node in ast.parse(block.code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if module is not None and is_installed(module.partition(".")[0]):
                exec(compile(ast.Module([node], []), "imports", "exec"), names)


@attrs.frozen
class Instance:
    """Stands for an object of a class."""

    of: type


def _resolve(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return what an expression stands for, None if that is not known."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        if isinstance(owner, Instance):
            return getattr(owner.of, node.attr)
        if inspect.ismodule(owner) or inspect.isclass(owner):
            return getattr(owner, node.attr)
    return None


def _check_call(call: ast.Call, names: Mapping[str, Any], place: str) -> None:
    called = _resolve(call.func, names)
    module = getattr(called, "__module__", None) or ""
    if not module.startswith(("tiledbsoma", "lightning")) or any(k.arg is None for k in call.keywords):
        return
    is_method = isinstance(call.func, ast.Attribute) and isinstance(
        _resolve(call.func.value, names), Instance
    )
    arguments = [*([None] if is_method else []), *call.args]
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    signature = inspect.signature(called)
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as err:
        raise AssertionError(f"{place}: {err}") from err
    rest = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if rest and called.__name__ in FORWARDS:
        unknown = set(bound.arguments.get(rest[0], {})) - set(
            inspect.signature(FORWARDS[called.__name__]).parameters
        )
        assert not unknown, f"{place}: {sorted(unknown)} are no arguments of it"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from tiledbsoma_ml import ExperimentDataset\nExperimentDataset(query, chunk=1)", "chunk"),
        ("import tiledbsoma_ml as m\nd = m.ExperimentDataset(q)\nd.set_epoch()", "epoch"),
        ("from tiledbsoma_ml import experiment_dataloader\nexperiment_dataloader(ds, workers=2)", "workers"),
    ],
)
def test_a_call_that_does_not_fit_is_found_without_running_it(code: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_calls(Block(code, 1, "python", "for a test"), {}, "somewhere")


# Commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_can_be_called_so(page: Path) -> None:
    for block in blocks_of(page.read_text()):
        if block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    """Raise an error if a command, or what it is called with, does not exist."""
    match words:
        case ["tiledbsoma-ml", name, *arguments]:
            check_options(name, arguments)
        case ["make", target, *assignments]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
            for assignment in assignments:
                check_make_variable(*assignment.split("=", 1))
        case ["pip", "install", *packages]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for package in packages:
                for extra in re.findall(r"\[(.*)\]", package):
                    assert set(extra.split(",")) <= set(extras), f"no extra {extra}"
        case ["python", script, *_] | ["torchrun", "--nproc-per-node", _, script, *_]:
            assert (ROOT / script).is_file(), f"no file {script}"
        case []:
            pass
        case _:
            raise AssertionError(f"{shlex.join(words)} is a command that this test does not know")


def check_options(name: str, arguments: list[str]) -> None:
    """Parse the arguments of `tiledbsoma-ml NAME`."""
    command = typer.main.get_command(build_app()).commands[name]  # type: ignore[attr-defined]
    try:
        command.make_context(name, arguments)
    except Exception as err:
        raise AssertionError(f"tiledbsoma-ml {name} {shlex.join(arguments)}: {err}") from err


def check_make_variable(name: str, value: str) -> None:
    if name == "DEMO_ARGS":
        check_command(["tiledbsoma-ml", "demo", *shlex.split(value)])
    elif name == "BENCH_ARGS":
        command = [sys.executable, "benchmarks/run.py", *shlex.split(value), "--list"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    else:
        raise AssertionError(f"make does not look at {name}")


@pytest.mark.parametrize("variable", ["SLOW_TESTS", "NEWEST_TESTS"])
def test_the_test_files_that_the_makefile_names_are_there(variable: str) -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    [value] = re.findall(rf"^{variable} *:= *(.+)$", makefile, re.MULTILINE)
    names = value.rpartition(",")[2].rstrip(")").split()
    assert len(names) > 3
    for name in names:
        assert len(list((ROOT / "tests").rglob(f"test_{name}.py"))) == 1, name


@pytest.mark.parametrize(
    "command", ["tiledbsoma-ml demo --h5da x", "make dmo", "pip install 'tiledbsoma-ml[cil]'", "rm -r x"]
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(command))


# Links and names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_api_page_has_every_public_name() -> None:
    documented = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert {f"tiledbsoma_ml.{name}" for name in tiledbsoma_ml.__all__} <= documented
    # What else the pages import from its modules is public, too.
    text = "\n".join(page.read_text() for page in PAGES)
    for module, names in re.findall(r"^ *from (tiledbsoma_ml\.\w+) import (.+)$", text, re.MULTILINE):
        assert {f"{module}.{name.strip()}" for name in names.split(",")} <= documented


# Building -------------------------------------------------------------------------------------------------


@pytest.mark.docs
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("furo") is None:
        pytest.skip("Sphinx is not installed; `make docs` installs it, and builds the same")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api.html").read_text()
    for name in tiledbsoma_ml.__all__:
        assert f'id="tiledbsoma_ml.{name}"' in api
    for notebook in NOTEBOOKS:
        assert (tmp_path / "notebooks" / f"{notebook.stem}.html").is_file()


# Plots ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("plots")


def test_plots_show_the_cases_that_were_measured_and_name_the_command(plots: Any, tmp_path: Path) -> None:
    newest = plots.Results.newest()
    plots.write_all(tmp_path, newest)
    speed = f"{newest.cases['auto, sparse']['rows_per_s']:,.0f}"
    assert speed in (tmp_path / "paths.md").read_text()
    assert "make bench" in (tmp_path / "source.md").read_text()
    assert len(list(tmp_path.glob("*.svg"))) == 8


def test_a_case_that_failed_is_left_out_of_plots(plots: Any, tmp_path: Path) -> None:
    newest = plots.Results.newest()
    content = json.loads(json.dumps(newest.content))
    for case in content["cases"]:
        if case["peer"] or case["name"] == "snapshot, creation":
            case |= {"status": "failed", "note": "failed: a test"}
    plots.write_all(tmp_path, plots.Results(content))
    assert "0.1.0" not in (tmp_path / "paths.md").read_text()
    assert "failed: a test" in (tmp_path / "cases.md").read_text()


def test_the_newest_results_are_taken(plots: Any, tmp_path: Path) -> None:
    for name, date in {"a": "2026-01-02", "b": "2026-01-03", "c": "2026-01-01"}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"date": date, "cases": []}))
    assert plots.Results.newest(tmp_path).content["date"] == "2026-01-03"
    with pytest.raises(ValueError, match="make bench"):
        plots.Results.newest(tmp_path / "empty")
