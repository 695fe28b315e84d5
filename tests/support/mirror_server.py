"""Mirrors on this machine that send the small archive, each well or badly in its own way."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from small_archive import BODY


class Answer(BaseHTTPRequestHandler):
    """Answers /NAME as the method NAME says."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        self.count = sum(path == self.path for path, _ in self.server.requests)  # 1: the probe
        self.start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        getattr(self, self.path[1:])()

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self, count: int, body: bytes = BODY) -> None:
        """Promise all from the start asked for, and send `count` bytes of it."""
        start, extent = self.start, {"Content_Length": str(len(body) - self.start)}
        if start:
            extent["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send(body[start : start + count], 206 if start else 200, **extent)

    def whole(self):
        self.begin(len(BODY))

    def no_range(self):
        self.send(BODY)

    def truncated_twice(self):
        self.begin(len(BODY) if self.count > 3 else 5_000 if self.start else 50_000)

    def always_truncated(self):
        self.start = 0
        self.begin(1_000)

    def chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for start in range(0, len(BODY), 40_000):
            piece = BODY[start : start + 40_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def missing(self):
        self.send_error(404)

    def vanishes(self):
        self.whole() if self.count == 1 else self.send_error(503)

    def html(self):
        self.send(b"<!DOCTYPE html><title>Log in</title>".ljust(len(BODY)), Content_Type="text/html")

    def other_length(self):
        self.send(BODY + b"x")

    def wrong_bytes(self):
        self.begin(len(BODY), BODY[:-1] + b"?")

    def hangs(self):
        if self.count == 1:
            return self.whole()
        self.start = 0
        self.begin(1_000)
        self.server.gate.wait(5)

    def trickles(self):
        self.send(b"", Content_Length=str(len(BODY)))
        self.trickle(BODY[:1_000])

    def trickles_a_header(self):
        self.whole() if self.count == 1 else self.trickle(b"HTTP/1.0 200 OK\r\n" + b"x" * 10_000)

    def trickle(self, data: bytes) -> None:
        """A byte every so often, until the test ends."""
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.gate.wait(0.02):
                break

    def to_ftp(self):
        self.send(b"", 302, Location=self.server.urls("whole").replace("http:", "ftp:"))

    def to_itself(self):
        self.send(b"", 302, Location="/to_itself")

    def escapes(self):
        self.send_response(404, "\x1b[2J gone")
        self.end_headers()

    def gated_half(self):
        if self.count == 1:
            return self.whole()
        self.begin(50_000)
        self.server.gated.set()
        self.server.gate.wait(20)
        self.wfile.write(BODY[50_000:])


class Server(ThreadingHTTPServer):
    """`requests` holds (path, Range header) of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests, self.gate, self.gated = [], threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        """A client that hangs up is part of several tests."""

    def urls(self, *names: str) -> str:
        return " ".join(f"http://127.0.0.1:{self.server_port}/{name}" for name in names)

    def downloads(self) -> list[str | None]:
        """The ranges asked for after the mirrors were probed, given that there was one mirror."""
        return [wanted for _, wanted in self.requests[1:]]
