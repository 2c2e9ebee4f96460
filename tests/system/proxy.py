"""A TCP proxy that tests cut: the network between an executor and an agent."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from types import TracebackType


class Proxy:
    """Forwards connections to an address until it is cut; new ones are taken but not served until it is healed."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()  # guards _pairs, _parked, _is_cut, _is_closed
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._parked: list[socket.socket] = []
        self._is_cut = self._is_closed = self._is_mute = False
        self.forwarded = 0  # bytes so far

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = "127.0.0.1:" + str(self._listener.getsockname()[1])
        self._wake_out, self._wake_in = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._is_closed = True
        self._wake()
        self._thread.join()
        for each in [*self._parked, *(end for pair in self._pairs for end in pair), self._listener, self._wake_in,
                     self._wake_out]:
            each.close()

    def cut(self, silently: bool = False) -> None:
        """Break all connections with a reset; or `silently`, so that bytes just do not arrive any more."""
        with self._lock:
            self._is_cut, self._is_mute = True, silently
            if not silently:
                self._reset()
        self._wake()

    def heal(self) -> None:
        """Serve connections again; those that were silent go on where they stopped."""
        with self._lock:
            self._is_cut = self._is_mute = False
        self._wake()

    def _reset(self) -> None:
        for pair in self._pairs:
            for end in pair:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
        self._pairs.clear()

    def _wake(self) -> None:
        self._wake_in.send(b".")

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_closed:
                    return
                if not self._is_cut:
                    self._serve_parked()
                peers = {} if self._is_mute else {
                    source: sink for pair in self._pairs for source, sink in (pair, pair[::-1])}
                with selectors.DefaultSelector() as selector:
                    for source in [self._listener, self._wake_out, *peers]:
                        selector.register(source, selectors.EVENT_READ)
                    self._lock.release()
                    try:
                        ready = [key.fileobj for key, _ in selector.select()]
                    finally:
                        self._lock.acquire()
                for source in ready:
                    if source is self._listener:
                        self._parked.append(self._listener.accept()[0])
                    elif source is self._wake_out:
                        self._wake_out.recv(4096)
                    elif not self._is_mute:
                        self._forward(source, peers[source])  # type: ignore[arg-type, index]

    def _serve_parked(self) -> None:
        for near in self._parked:
            with contextlib.suppress(OSError):  # the agent is gone: then the connection ends
                self._pairs.append((near, socket.create_connection(self._target)))
                continue
            near.close()
        self._parked.clear()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        if source.fileno() < 0:
            return  # closed since it was found ready
        try:
            piece = source.recv(1 << 16)
            if piece:
                self.forwarded += len(piece)
                sink.sendall(piece)
                return
        except OSError:
            pass  # either end is gone: the other is told by its own end closing
        self._pairs = [pair for pair in self._pairs if source not in pair]
        source.close()
        sink.close()
