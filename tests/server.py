"""A running StreamPipe in this process, and viewers that read from it over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

import pipe

TIMEOUT = 20.0  # seconds; longer than any event that a test waits for
BROWSER = "text/html,application/xhtml+xml,*/*;q=0.8"  # a browser's Accept header for a page


@dataclass
class Answer:
    """A whole answer; `is_complete`: its body was not cut off."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    is_complete: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Watch:
    """One viewer: a connection that requests a stream, and reads only when a test calls `read`."""

    def __init__(self, port: int, path: str, *, http10: bool = False, **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        if http10:  # the library has no public option for this
            vars(self.connection).update(_http_vsn=10, _http_vsn_str="HTTP/1.0")
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.headers = self.response.headers

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer only if the body ends earlier."""
        return self.response.read(size)

    def read_all(self) -> tuple[bytes, bool]:
        """The rest of the body, and whether it is complete."""
        parts: list[bytes] = []
        try:
            while part := self.response.read1(65536):
                parts.append(part)
        except (http.client.IncompleteRead, ConnectionError):
            return b"".join(parts), False
        return b"".join(parts), True

    def close(self) -> None:
        self.response.close()
        self.connection.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Site:
    """A server on 127.0.0.1 with these streams.

    `server`, `playlists` and the other keywords are the sections `server:`, `playlists:` and
    `options:` of the file.
    """

    def __init__(
        self,
        streams: Mapping[str, object],
        *,
        server: Mapping[str, object] | None = None,
        playlists: Mapping[str, object] | None = None,
        **options: object,
    ) -> None:
        settings = {"host": "127.0.0.1", "port": 0, **(server or {})}
        tree: dict[str, object] = {"server": settings, "streams": dict(streams)}
        if playlists:
            tree["playlists"] = dict(playlists)
        if options:
            tree["options"] = options
        text = yaml.safe_dump(tree, sort_keys=False)
        self.config = pipe.ConfigReader("test.yml", pipe.engine_options()).read(text)
        self.channels = pipe.Channels(self.config)
        self.server = pipe.Server(self.config, self.channels)
        self.port = self.server.port
        self.url = f"http://127.0.0.1:{self.port}"
        self._listener = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._listener.start()
        self.server.lists.start()
        self._watches: list[Watch] = []

    def watch(self, path: str, *, http10: bool = False, **headers: str) -> Watch:
        """Request a stream; returns once the answer's head has arrived.  Closed with the site."""
        self._watches.append(Watch(self.port, path, http10=http10, **headers))
        return self._watches[-1]

    def get(self, path: str, *, http10: bool = False, **headers: str) -> Answer:
        """A whole answer, read to its end."""
        with self.watch(path, http10=http10, **headers) as viewer:
            body, is_complete = viewer.read_all()
            return Answer(viewer.status, viewer.headers, body, is_complete)

    def ask(self, method: str, path: str, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def raw(self, request: bytes) -> bytes:
        """Send these bytes; returns all bytes of the answer until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as sock:
            sock.sendall(request)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def close(self) -> None:
        """Stop the server and join its threads."""
        for watch in self._watches:
            watch.close()
        assert self.server.lists.stop(TIMEOUT), "a list's thread did not end"
        assert self.channels.stop(TIMEOUT), "a feeder did not end"
        self.server.shutdown()
        self.server.hang_up()
        self.server.server_close()
        self._listener.join(TIMEOUT)
