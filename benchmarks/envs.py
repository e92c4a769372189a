"""Virtual environments of the peers, each from its list of requirements."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = tuple(sorted(path.parent.name for path in HERE.glob("peers/*/requirements.txt")))


class NotInstalledError(Exception):
    """A peer could not be installed; says what pip said last, or which Python is missing."""


def peer_python(peer: str, envs_dir: Path) -> Path:
    """Return the Python of a peer's environment, which is made now if it is not there.

    A peer may have a `python.txt` with the version of Python that it needs.

    Raises:
        NotInstalledError: If pip fails, or that Python is not found.
    """
    folder, env = HERE / "peers" / peer, envs_dir / peer
    requirements, unwanted = folder / "requirements.txt", folder / "uninstall.txt"
    stamp = env / "requirements.sha256"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    python = env / "bin" / "python"
    if stamp.exists() and stamp.read_text() == digest:
        return python
    version = folder / "python.txt"
    base = _find_python(version.read_text().strip()) if version.exists() else sys.executable
    _run(base, "-m", "venv", "--clear", env)
    # One by one, so that what the first lines pin is there before the later ones ask for it.
    for line in requirements.read_text().splitlines():
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", line)
    if unwanted.exists():
        _run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "--requirement", unwanted)
    stamp.write_text(digest)
    return python


def _find_python(version: str) -> Path:
    """Return a Python of a version that starts, on the search path or among those of pyenv."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    found = [*([on_path] if on_path else []), *sorted(of_pyenv.glob(f"{version}*/bin/python"), reverse=True)]
    for python in map(Path, found):
        if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:
            return python
    raise NotInstalledError(f"needs Python {version}, which was not found")


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstalledError(lines[-1] if lines else f"{command[0]} exited with {done.returncode}")
