from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiledbsoma_ml.snapshot.content import Content
from tiledbsoma_ml.snapshot.takeover import Partial
from tiledbsoma_ml.snapshot.tasks import Tasks, makers, remove_tasks

NAMES = ["a", "b", "c"]
NO_CONTENT = Content(sources=(), n_vars=0, var_digest="", layer_names=(), obs_column_names=(), obsm_names=())


@pytest.fixture
def folder(path: Path) -> Path:
    folder = path.with_name("building")
    folder.mkdir()
    return folder


def join(path: Path, creation: str = "one") -> Tasks:
    """Take part in a creation; with another name than before, it replaces the one before."""
    folder = path.with_name("building")
    Partial(content=NO_CONTENT, borders=[0], bytes_per_row={}, compression=None, creation=creation).write(
        folder
    )
    return Tasks(path, folder, creation)


def never(_: object) -> bool:
    return False


def always(_: object) -> bool:
    return True


MAKERS = st.integers(0, 2)
STEPS = st.lists(st.tuples(st.sampled_from(["claim", "finish", "end"]), MAKERS, st.sampled_from(NAMES)))


@settings(max_examples=30)
@given(STEPS)
def test_a_task_has_one_maker_at_a_time_and_is_finished_once_in_whatever_sequence_they_claim_finish_and_end(
    steps: list[tuple[str, int, str]],
) -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        path = Path(name) / "x"
        path.with_name("building").mkdir()
        joined: list[Tasks] = []
        for _ in range(3):
            joined.append(join(path))
            stack.callback(joined[-1].close)
        claims: dict[str, int] = {}
        records: dict[str, int] = {}
        for what, maker, task in steps:
            if what == "claim":
                is_free = task not in claims and task not in records
                assert joined[maker].claim(task, never) == is_free
                if is_free:
                    claims[task] = maker
            elif what == "finish" and claims.get(task) == maker:
                joined[maker].finish(task, {"by": maker})
                records[task] = claims.pop(task)
            elif what == "end":
                joined[maker].close()
                claims = {task: other for task, other in claims.items() if other != maker}
                joined[maker] = join(path)
                stack.callback(joined[maker].close)
            for one in joined:
                assert {task: record["by"] for task in NAMES if (record := one.record(task))} == records
                assert one.recorded() == set(records)
        assert len(makers(path)) == 3


def test_what_an_earlier_creation_finished_is_taken_over_by_whoever_claims_it_if_it_is_right(
    path: Path, folder: Path
) -> None:
    tasks = join(path)
    for name in NAMES[:2]:
        assert tasks.claim(name, never)
        tasks.finish(name, {"name": name})
    tasks.close()
    again = join(path, "two")
    assert again.record("a") is None
    assert again.recorded() == {"a", "b"}
    assert not again.claim("a", lambda record: bool(record == {"name": "a"}))
    assert again.record("a") == {"name": "a"}
    assert again.is_checked("a")
    assert again.claim("b", never)
    assert again.recorded() == {"a"}
    assert not again.is_checked("b")
    again.close()


def test_what_was_checked_in_an_earlier_creation_is_not_checked_in_this_one(path: Path, folder: Path) -> None:
    tasks = join(path)
    assert not tasks.is_checked("a")
    tasks.note_checked("a")
    assert tasks.is_checked("a")
    again = join(path, "two")
    assert not again.is_checked("a")
    tasks.close()
    again.close()


def test_a_creation_that_another_one_replaced_or_that_was_completed_gives_no_task(
    path: Path, folder: Path
) -> None:
    first = join(path)
    assert first.goes_on
    second = join(path, "two")
    assert not first.goes_on
    assert not first.claim("a", never)
    assert second.claim("a", always)
    second.finish("a", {})
    remove_tasks(folder)
    assert not second.claim("b", never)
    assert second.recorded() is None
    assert not [file.name for file in folder.iterdir() if file.name.startswith("tasks")]
    first.close()
    second.close()


def test_makers_are_those_that_take_part_and_did_not_end(path: Path, folder: Path) -> None:
    of_another = join(path.with_name(f"{path.name}.other"))
    tasks = join(path)
    (path.with_name(f".{path.name}.01234567.maker")).write_text("7")  # as a process leaves it that is killed
    assert len(makers(path)) == 1
    assert len(list(path.parent.glob("*.maker"))) == 2
    tasks.close()
    assert makers(path) == []
    assert len(list(path.parent.glob("*.maker"))) == 1
    of_another.close()
