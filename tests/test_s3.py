"""An experiment on S3: real requests over loopback, to moto's server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
import tiledbsoma as soma
from moto.server import ThreadedMotoServer

from stores import MEASUREMENT, N_OBS, joinids_of, make_experiment, workers
from tiledbsoma_ml import ExperimentDataset, Snapshot, experiment_dataloader

BUCKET = "census"


@pytest.fixture(scope="module")
def s3_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Serve test experiments in s3://census, "experiment" and "changing"; yield the configuration."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "an-id", "aws_secret_access_key": "a-secret"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    folder = tmp_path_factory.mktemp("s3")
    make_experiment(folder / "experiment")
    make_experiment(folder / "changing", obs_joinids=range(20))
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), BUCKET, file.relative_to(folder).as_posix())
    yield {
        "vfs.s3.endpoint_override": f"{host}:{port}",
        "vfs.s3.scheme": "http",
        "vfs.s3.use_virtual_addressing": "false",
        "vfs.s3.region": "us-east-1",
        **{f"vfs.s3.{name}": value for name, value in keys.items()},
    }
    server.stop()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_experiment_on_s3_is_read_with_the_credentials_of_the_users_context(
    s3_config: dict[str, str], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    context = soma.SOMATileDBContext(tiledb_config=s3_config)
    with (
        soma.Experiment.open(f"s3://{BUCKET}/experiment", context=context) as experiment,
        experiment.axis_query(MEASUREMENT) as query,
    ):
        dataset = ExperimentDataset(query, batch_size=50, io_batch_size=128)
    loader = experiment_dataloader(dataset, **workers(num_workers))
    assert sorted(joinids_of(loader)) == list(range(N_OBS))


def test_a_snapshot_of_an_experiment_on_s3_that_was_written_to_since_is_not_used(
    s3_config: dict[str, str], tmp_path: Path
) -> None:
    uri, path = f"s3://{BUCKET}/changing", tmp_path / "x.snapshot"
    context = soma.SOMATileDBContext(tiledb_config=s3_config)
    with (
        soma.Experiment.open(uri, context=context) as experiment,
        experiment.axis_query(MEASUREMENT) as query,
    ):
        Snapshot.create(path, query, progress=False)
        ExperimentDataset(query, snapshot=path)
    with soma.SparseNDArray.open(f"{uri}/ms/{MEASUREMENT}/X/raw", "w", context=context) as X:
        entry = {"soma_dim_0": [1], "soma_dim_1": [1], "soma_data": pa.array([7.0], pa.float32())}
        X.write(pa.table(entry))
    context = soma.SOMATileDBContext(tiledb_config=s3_config)
    with (
        soma.Experiment.open(uri, context=context) as experiment,
        experiment.axis_query(MEASUREMENT) as query,
    ):
        with pytest.raises(ValueError, match="X/raw was written to since the snapshot was made"):
            ExperimentDataset(query, snapshot=path)
        with pytest.raises(ValueError, match="X/raw was written to since the snapshot was made"):
            Snapshot.create(path, query, progress=False)
