from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snapshots import ALL_OBS
from stores import N_OBS, N_VARS, expected_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.format import MANIFEST


def test_a_snapshot_is_opened_without_reading_data(copied_either: Path) -> None:
    for path in copied_either.iterdir():
        if path.name != MANIFEST and path.suffix != ".indptr":  # of which the ends are looked at
            path.write_bytes(b"x" * path.stat().st_size)  # no data that could be read
    opened = Snapshot.open(copied_either)
    assert opened.shape == (N_OBS, N_VARS)
    assert opened.nnz == np.count_nonzero(expected_X(range(N_OBS), range(N_VARS)))
    sizes = [path.stat().st_size for path in copied_either.iterdir() if path.name != MANIFEST]
    assert opened.nbytes == sum(sizes)
    assert opened.layer_name == "raw"
    assert opened.obs_column_names == tuple(ALL_OBS)
    assert str(copied_either) in repr(opened)


FUZZ = """
import os, random, resource, shutil, sys
from pathlib import Path
import numpy as np
from snapshots import MANIFEST, Snapshot, with_manifest

source, path = Path(sys.argv[1]), Path(sys.argv[2])
names = sorted(file.name for file in source.iterdir() if file.stat().st_size and file.name != MANIFEST)
rng = random.Random(0)

def read(snapshot):
    ids, found = snapshot.query_ids.obs_joinids, []
    some = snapshot.var_joinids[[7, 3, 20]]
    for reader in (snapshot.reader(), snapshot.reader(ids, some, ["soma_joinid"])):
        X, dense = reader.csr(ids[::-1]), np.empty((len(ids), reader.n_vars), reader.dtype)
        X @ X.T
        reader.fill_dense(ids[::-1], dense)
        found += [X.toarray(), dense, *(rows.X.slice_tonumpy(slice(None)) for rows in reader.read(ids))]
    return [array.tobytes() for array in found] + [snapshot.obs.to_csv(), snapshot.var.to_csv()]

right, results = read(Snapshot.open(source)), []
for k in range(120):
    content = bytearray((source / names[k % len(names)]).read_bytes())
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(content))
        content[place] = rng.choice([content[place] ^ 1 << rng.randrange(8), 0, 127, 255])
    (path / names[k % len(names)]).write_bytes(content)
    is_same = content == (source / names[k % len(names)]).read_bytes()
    if is_fitted := k % 3 > 0:
        with_manifest(path, lambda fields: None)
    try:
        results.append("right" if read(Snapshot.open(path)) == right else "other")
    except ValueError as err:
        assert str(path) in str(err), err
        results.append("told")
    try:
        Snapshot(path, Snapshot.open(source)._manifest).verify()
        assert is_same or is_fitted
    except ValueError as err:
        assert str(path) in str(err), err
        assert not is_same
    for name in (names[k % len(names)], MANIFEST):
        shutil.copy(source / name, path / name)

snapshot = Snapshot.open(path)
reader = snapshot.reader()
if not (child := os.fork()):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.truncate(path / "shard-00001.indices", 0)
    reader.csr(snapshot.obs_joinids)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(*(f"{results.count(result)} {result}" for result in ("right", "other", "told")), status, "status")
"""


def test_bytes_that_change_in_any_file_never_end_a_process_but_a_file_that_is_cut_while_it_is_mapped_does(
    either: Snapshot, copied_either: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FUZZ, str(either.path), str(copied_either)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = dict(zip(done.stdout.split()[1::2], map(int, done.stdout.split()[::2]), strict=True))
    assert counts["told"] > 10
    assert counts["other"] > (10 if either.compression is None else 0)  # blocks have checksums
    assert os.WTERMSIG(counts["status"]) == signal.SIGBUS
    with pytest.raises(ValueError, match=r"shard-00001\.indices' must have .* bytes .*, not 0"):
        Snapshot.open(copied_either)
