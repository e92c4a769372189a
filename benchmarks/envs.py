"""Virtual environments of the peers, each from its list of requirements."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = tuple(sorted(path.parent.name for path in HERE.glob("peers/*/requirements.txt")))


class NotInstalledError(Exception):
    """A peer could not be installed; says what pip said last."""


def peer_python(peer: str, envs_dir: Path) -> Path:
    """Return the Python of a peer's environment, which is made now if it is not there.

    Raises:
        NotInstalledError: If pip fails.
    """
    folder, env = HERE / "peers" / peer, envs_dir / peer
    requirements, unwanted = folder / "requirements.txt", folder / "uninstall.txt"
    stamp = env / "requirements.sha256"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    python = env / "bin" / "python"
    if stamp.exists() and stamp.read_text() == digest:
        return python
    _run(sys.executable, "-m", "venv", "--clear", env)
    # One by one, so that what the first lines pin is there before the later ones ask for it.
    for line in requirements.read_text().splitlines():
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", line)
    if unwanted.exists():
        _run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "--requirement", unwanted)
    stamp.write_text(digest)
    return python


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstalledError(lines[-1] if lines else f"{command[0]} exited with {done.returncode}")
