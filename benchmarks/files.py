"""One large file each way, in MB per second, beside what sockets carry when a program reads, sends and writes it itself.

Ours hash it as well, at both ends, and put it into its place only when it is whole. The file is in the page cache, so it is
the ways that are measured and not the disk.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from benchmarks import sockets
from benchmarks.contenders import ADDRESS_VARIABLE, SECRET_VARIABLE
from benchmarks.measures import Numbers
from benchmarks.work import send_file, size_of
from distexec import ClusterExecutor

PIECE_BYTES = 1 << 20
BARE = "bare socket"


def file_speed(name: str, size_bytes: int) -> Numbers:
    """Send a file from a task to its client, and from the client to where tasks find it."""
    with _file(size_bytes) as (directory, path):
        if name == BARE:
            return {f"{kind}_mb_per_s": _bare(path, directory / "copy", certificate)
                    for kind, certificate in (("tcp", None), ("tls", sockets.make_certificate(directory)))}
        nodes = "local" if name == "cluster" else os.environ[ADDRESS_VARIABLE]
        with ClusterExecutor(1, nodes=nodes, secret=os.environ[SECRET_VARIABLE], downloads=directory / "got") as executor:
            executor.submit(size_of, str(path)).result()
            to_client_s = _seconds(lambda: executor.submit(send_file, str(path)).result())
            view = executor.options(files=path)
            to_task_s = _seconds(lambda: view.submit(size_of, path.name).result())
            return {"file_to_client_mb_per_s": size_bytes / 1e6 / to_client_s,
                    "file_to_task_mb_per_s": size_bytes / 1e6 / to_task_s}


@contextmanager
def _file(size_bytes: int) -> Iterator[tuple[Path, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="distexec-bench-"))
    try:
        with (directory / "file").open("wb") as file:
            for _ in range(size_bytes // PIECE_BYTES):
                file.write(os.urandom(PIECE_BYTES))
        yield directory, directory / "file"
    finally:
        shutil.rmtree(directory)


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _bare(path: Path, copy: Path, certificate: str | None) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = get_context("fork").Process(target=_receive, args=(listener, certificate, copy, path.stat().st_size))
        receiver.start()
        with sockets.connect(listener.getsockname(), certificate) as sock, path.open("rb") as file:
            began = time.perf_counter()
            while piece := file.read(PIECE_BYTES):
                sock.sendall(piece)
            sock.recv(1)
            taken_s = time.perf_counter() - began
        receiver.join()
    copy.unlink()
    return path.stat().st_size / 1e6 / taken_s


def _receive(listener: socket.socket, certificate: str | None, copy: Path, size_bytes: int) -> None:
    with sockets.accept(listener, certificate) as sock, copy.open("wb") as file:
        left, buffer = size_bytes, memoryview(bytearray(PIECE_BYTES))
        while left:
            got = sock.recv_into(buffer)
            file.write(buffer[:got])
            left -= got
        sock.sendall(b"k")
