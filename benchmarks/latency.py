"""A server like S3 on this machine that answers late: moto's, behind a proxy that delays and counts requests.

python benchmarks/latency.py FOLDER 50      # serves FOLDER, each request 50 ms late, until it is ended
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COUNTS_PATH = "/-/counts"
"""What the proxy itself answers, with the numbers of requests and bytes until then."""

_BUCKET = "benchmarks"
_KEYS = {"aws_access_key_id": "an-id", "aws_secret_access_key": "a-secret"}
_REGION = "us-east-1"


@contextmanager
def serving(python: Path, folder: Path, delay_ms: float) -> Iterator[dict[str, Any]]:
    """Serve a folder from a process of its own; yield `uri`, and `store`: the settings that TileDB needs.

    Raises:
        RuntimeError: If it cannot be served; says why.
    """
    command = [str(python), __file__, str(folder), str(delay_ms)]
    # The server logs each request. A pipe that nobody empties would stop it when it is full.
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            if not (line := server.stdout.readline()):
                log.seek(0)
                raise RuntimeError(log.read().strip().splitlines()[-1])
            yield json.loads(line)
        finally:
            server.terminate()
            server.communicate()


def main(folder: Path, delay_s: float) -> None:
    host, port = _serve_s3(folder)
    asyncio.run(_serve_late(host, port, delay_s, folder.name))


def _serve_s3(folder: Path) -> tuple[str, int]:
    """Start moto's server on a thread, with the files of a folder in its memory."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name=_REGION, **_KEYS)
    client.create_bucket(Bucket=_BUCKET)
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), _BUCKET, file.relative_to(folder.parent).as_posix())
    return host, port


async def _serve_late(host: str, port: int, delay_s: float, name: str) -> None:
    proxy = Proxy(host, port, delay_s)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    config = {
        "vfs.s3.endpoint_override": f"127.0.0.1:{server.sockets[0].getsockname()[1]}",
        "vfs.s3.scheme": "http",
        "vfs.s3.use_virtual_addressing": "false",
        "vfs.s3.region": _REGION,
        "vfs.s3.request_timeout_ms": "60000",  # the server may be slow, but answers
        **{f"vfs.s3.{key}": value for key, value in _KEYS.items()},
    }
    print(json.dumps({"uri": f"s3://{_BUCKET}/{name}", "store": config}), flush=True)
    async with server:
        await server.serve_forever()


class Proxy:
    """Passes requests on, each after a delay, and as many at a time as come."""

    def __init__(self, host: str, port: int, delay_s: float) -> None:
        self._upstream, self._delay_s = (host, port), delay_s
        self._requests = self._bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection, one after the other."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(_content_length(head) or 0)
                writer.write(await self._answer(head, body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has closed the connection
        finally:
            writer.close()

    async def _answer(self, head: bytes, body: bytes) -> bytes:
        method, path = head.split(b" ", 2)[:2]
        if path == COUNTS_PATH.encode():
            counts = json.dumps({"requests": self._requests, "request_bytes": self._bytes}).encode()
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(counts) + counts
        await asyncio.sleep(self._delay_s)
        answer_head, content = await self._pass_on(head, body)
        self._requests += 1
        self._bytes += len(content)
        # The answer ended with its connection; that of the client goes on, so the length must be told.
        length = _content_length(answer_head) if method == b"HEAD" else len(content)
        lines = [line for line in answer_head.split(b"\r\n")[1:] if not line.lower().startswith(_OF_HOP)]
        status = b"HTTP/1.1 " + answer_head.split(b"\r\n")[0].partition(b" ")[2]
        return b"\r\n".join([status, *lines, b"Content-Length: %d" % (length or 0), b"", content])

    async def _pass_on(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Return head and content of the answer, which with HTTP 1.0 ends where the connection does."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        writer.write(head.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1) + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        answer_head, _, content = answer.partition(b"\r\n\r\n")
        return answer_head, content


_OF_HOP = b"connection:", b"content-length:", b"transfer-encoding:", b"keep-alive:"


def _content_length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) / 1000)
