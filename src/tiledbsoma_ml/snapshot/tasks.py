"""`Tasks`: the tasks of a creation, each of which one of several processes claims, makes and records.

A claim is a lock of the operating system, which ends with its process. A task is finished when its record is
there.
"""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from tiledbsoma_ml.snapshot.claim import Claim, claim, claimed_by
from tiledbsoma_ml.snapshot.files import (
    FORMAT,
    FORMAT_VERSION,
    open_new,
    read_sealed,
    sealed,
    write_atomically,
)
from tiledbsoma_ml.snapshot.takeover import is_current

TASKS = "tasks"

Record: TypeAlias = dict[str, Any]
"""What the manifest says of that which a task made."""


class Tasks:
    """The tasks of a creation, and the part that this process takes in it, until it is closed.

    Claims and records are files in a folder, in which several threads and processes can use them at once.

    Args:
        path: The path of the snapshot.
        folder: The folder in which the snapshot is made.
        creation: Name of the creation. Records with another name are of an earlier creation.
    """

    def __init__(self, path: Path, folder: Path, creation: str) -> None:
        self._folder = folder / TASKS
        self._creation = creation
        self._claims: dict[str, Claim] = {}
        self._records: dict[str, Record] = {}
        self._folder.mkdir(exist_ok=True)
        self._presence_file = path.with_name(f".{path.name}.{secrets.token_hex(4)}.maker")
        self._presence = claim(self._presence_file)

    @property
    def goes_on(self) -> bool:
        """Whether nobody has completed the snapshot."""
        return is_current(self._folder.parent, self._creation)

    def claim(self, name: str, is_right: Callable[[Record], bool]) -> bool:
        """Claim a task that is not finished and that nobody else has; return whether it is claimed now.

        Args:
            name: Name of the task.
            is_right: Function that tells whether a record of an earlier creation is still right. If it is,
                the task is finished.
        """
        if self.record(name) is not None:
            return False
        claimed = claim(self._folder / f"{name}.lock")
        if claimed is None:
            return False
        try:
            is_free = self.goes_on and self.record(name) is None and not self._take_over(name, is_right)
        except BaseException:
            claimed.give_back()
            raise
        if is_free:
            self._claims[name] = claimed
        else:
            claimed.give_back()
        return is_free

    def finish(self, name: str, record: Record) -> None:
        """Record a task that this process claimed and made, and end the claim."""
        self._write(name, record)
        self._claims.pop(name).give_back()

    def note_checked(self, name: str) -> None:
        """Note that what a finished task made was read from the disk, and is right."""
        with open_new(self._folder / f"{name}.checked") as file:
            file.write(self._creation.encode())

    def is_checked(self, name: str) -> bool:
        """Return whether a process noted in this creation that what a task made is right."""
        with suppress(FileNotFoundError):
            return (self._folder / f"{name}.checked").read_text() == self._creation
        return False

    def record(self, name: str) -> Record | None:
        """Return the record of a finished task; None if it is not finished in this creation."""
        if name not in self._records:
            found = self._read(name)
            if found.get("creation") == self._creation:
                self._records[name] = found["made"]
        return self._records.get(name)

    def recorded(self) -> set[str] | None:
        """Return the names of the tasks that this creation or an earlier one finished; None if all did."""
        try:
            return {file.stem for file in self._folder.iterdir() if file.suffix == ".json"}
        except FileNotFoundError:  # the snapshot was completed
            return None

    def makers_of(self, names: Iterable[str]) -> list[str]:
        """Return the ids of the processes that claimed some of these tasks last."""
        return sorted({claimed_by(self._folder / f"{name}.lock") for name in names})

    def close(self) -> None:
        """Give back all claims, and take part no longer."""
        while self._claims:
            self._claims.popitem()[1].give_back()
        if self._presence is not None:
            self._presence_file.unlink(missing_ok=True)
            self._presence.give_back()
            self._presence = None

    def _take_over(self, name: str, is_right: Callable[[Record], bool]) -> bool:
        """Return whether an earlier creation finished a task, and what it made is right; forget it if not."""
        found = self._read(name)
        if "made" not in found:
            return False
        if is_right(found["made"]):
            self._write(name, found["made"])
            self.note_checked(name)
            return True
        (self._folder / f"{name}.json").unlink()
        return False

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_sealed(self._folder / f"{name}.json", "a task of a creation")
        except ValueError:
            return {}

    def _write(self, name: str, record: Record) -> None:
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "creation": self._creation,
            "made": record,
        }
        write_atomically(self._folder / f"{name}.json", sealed(fields))
        self._records[name] = record


def makers(path: Path) -> list[str]:
    """Return the ids of the processes that make the snapshot at a path; forget those that ended."""
    found = []
    for file in path.parent.glob(f".{glob.escape(path.name)}.{8 * '?'}.maker"):
        with suppress(PermissionError):  # another user's, who does not make it: the folder is not theirs
            if (claimed := claim(file)) is None:
                found.append(claimed_by(file))
            else:
                file.unlink(missing_ok=True)
                claimed.give_back()
    return found


def remove_tasks(folder: Path) -> None:
    """Remove all claims and records; meanwhile no other process can add one."""
    removed = folder / f"{TASKS}.removed"
    with suppress(FileNotFoundError):
        (folder / TASKS).rename(removed)
    with suppress(FileNotFoundError):
        shutil.rmtree(removed)
