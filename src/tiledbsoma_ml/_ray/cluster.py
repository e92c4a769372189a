"""The Ray cluster: how this process connects to it, how many workers it has room for, and why they failed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import attrs
import ray
import ray.train

from tiledbsoma_ml._common import absolute_uri, check_bool, check_count, warn

CPUS_PER_WORKER = 4
"""CPUs that each worker gets where the cluster has as many and `resources_per_worker` does not say."""


@attrs.frozen(kw_only=True)
class Workers:
    """The workers that were asked for.

    Attributes:
        n_workers: Their number; None for one for each GPU or, on CPUs, as many as the cluster has room for.
        resources: What Ray reserves for each; None for what `CPUS_PER_WORKER` says.
        use_gpu: Whether each gets a GPU.
    """

    n_workers: int | None
    resources: Mapping[str, float] | None
    use_gpu: bool

    @classmethod
    def create(cls, n_workers: int | None, resources: Mapping[str, float] | None, use_gpu: bool) -> Workers:
        """Return what the arguments of `RayTrainRunner.train` say, checked."""
        if n_workers is not None:
            check_count("num_workers", n_workers, suggestion=2)
        return cls(n_workers=n_workers, resources=resources, use_gpu=check_bool("use_gpu", use_gpu))

    def scaling(self) -> ray.train.ScalingConfig:
        """Return how many workers there are, and what each has, so that the nodes can hold them."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        n_gpus = int(sum(node.get("GPU", 0) for node in nodes))
        use_gpu = self.use_gpu and n_gpus > 0
        if self.use_gpu and not use_gpu:
            warn(
                "use_gpu=True, but the Ray cluster has no GPU: training on CPUs; set use_gpu=False if you "
                "want that."
            )
        each = self._of_each(nodes, use_gpu=use_gpu, wanted=self.n_workers or (n_gpus if use_gpu else 1))
        n_possible = n_possible_workers(nodes, each)
        n_workers = self.n_workers or max(1, n_possible)
        if n_workers > n_possible:
            warn(
                f"num_workers={n_workers} with {each} each, but the Ray cluster can hold {n_possible} of "
                "them: Ray waits until nodes are added; ask for fewer or smaller workers if none will be."
            )
        return ray.train.ScalingConfig(num_workers=n_workers, use_gpu=use_gpu, resources_per_worker=each)

    def _of_each(
        self, nodes: Sequence[Mapping[str, float]], *, use_gpu: bool, wanted: int
    ) -> dict[str, float]:
        """Return the resources of each worker: as many CPUs as leave nodes enough for all wanted workers."""
        if self.resources is not None:
            return {name: amount for name, amount in self.resources.items() if name != "GPU" or use_gpu}
        gpu = {"GPU": 1.0} if use_gpu else {}
        choices = [{"CPU": float(n_cpus), **gpu} for n_cpus in range(CPUS_PER_WORKER, 0, -1)]
        return next((each for each in choices if n_possible_workers(nodes, each) >= wanted), choices[-1])


def n_possible_workers(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Return how many workers the nodes can hold."""
    needed = {name: amount for name, amount in each.items() if amount}
    return sum(int(min(node.get(name, 0) // amount for name, amount in needed.items())) for node in nodes)


def run_config(
    storage_path: str | os.PathLike[str], name: str | None, max_failures: int
) -> ray.train.RunConfig:
    """Return where a run is stored, and how often it starts again."""
    return ray.train.RunConfig(
        name=name,
        storage_path=absolute_uri(storage_path, "storage_path"),
        failure_config=ray.train.FailureConfig(max_failures=max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
    )


def warn_if_connected(address: str | None, runtime_env: Mapping[str, object] | None) -> None:
    """Warn where this process is connected to a cluster already, so that another cannot be chosen."""
    if ray.is_initialized() and (address is not None or runtime_env is not None):
        warn(
            f"address={address!r} and runtime_env are ignored: this process is connected to a Ray cluster "
            "already; call ray.shutdown() first."
        )


@contextmanager
def connected(address: str | None, runtime_env: Mapping[str, object] | None) -> Iterator[None]:
    """Connect to a cluster, unless this process is connected to one; then undo what was done for it."""
    is_connected = ray.is_initialized()
    on_interrupt = signal.getsignal(signal.SIGINT)
    if not is_connected:
        ray.init(address=address, runtime_env=dict(runtime_env or {}))
    try:
        yield
    finally:
        if not is_connected:
            ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray's trainer puts its own there


@contextmanager
def naming_ranks() -> Iterator[None]:
    """Say which workers failed and why; the message of Ray alone is cut short."""
    try:
        yield
    except ray.train.WorkerGroupError as err:
        causes = [f"rank {rank}: {_cause(failure)}" for rank, failure in sorted(err.worker_failures.items())]
        raise ray.train.WorkerGroupError("\n".join(causes), err.worker_failures) from err


def _cause(failure: Exception) -> str:
    text = str(failure).strip()
    if text.startswith("Traceback"):
        return text.splitlines()[-1]
    return f"{type(failure).__name__}: {' '.join(text.split())}"
