"""The events of a Chrome trace, one at a time: a trace may be larger than memory, cut off, or not a trace at all.

The file is {..., "traceEvents": [event, ...], ...} or a bare [event, ...], plain or gzip. A number with a fraction is
handed over as its text: microseconds since boot, with nanoseconds behind the point, do not fit a float.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 18
LARGEST_VALUE = 1 << 23
"""Characters. Nothing that a profiler writes about one event comes near."""

_DECODER = json.JSONDecoder(parse_float=str, parse_constant=str, strict=False)
_SEPARATORS = re.compile(r"[\s,]*")
_NEXT_EVENT = re.compile(r'\}\s{0,64},\s{0,64}(?=\{\s{0,64}")')
_LONGEST_BORDER = 200  # characters of what it finds, and more


class TraceEvents:
    """Iterate over the events of the trace at `path`, each a dict.

    `lacks` has afterwards a sentence for everything that could not be read; what stands around it was handed over.
    Raises OSError where the file cannot be opened or read, and nothing else whatever is in it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lacks: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            text = _Text(self._pieces(file))
            try:
                yield from self._document(text)
                for _ in text.pieces:  # to the end, where gzip has its checksum
                    pass
            except EOFError:
                how = f"is cut off, or damaged from character {text.read:,} on" if text.read else "is empty"
                self.lacks.append(f"trace incomplete: the file {how}")
            except (ValueError, RecursionError) as error:
                self.lacks.append(f"trace incomplete: not JSON from character {text.read:,} on ({error})"[:200])

    def _pieces(self, file: IO[bytes]) -> Iterator[str]:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if is_gzip else file
        decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        while True:
            try:
                block = stream.read1(CHUNK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.lacks.append(f"trace incomplete: damaged gzip file ({error})")
                block = b""
            if not block:
                return
            if piece := decoder.decode(block):
                yield piece

    def _document(self, text: "_Text") -> Iterator[dict[str, Any]]:
        if text.next_character() == "[":
            yield from self._array(text)
            return
        text.expect("{")
        found = False
        while text.next_character() != "}":
            key = text.value()
            text.expect(":")
            if key == "traceEvents" and text.next_character() == "[":
                found = True
                yield from self._array(text)
                continue
            text.value()
        if not found:
            self.lacks.append("trace incomplete: the file has no traceEvents")

    def _array(self, text: "_Text") -> Iterator[dict[str, Any]]:
        text.expect("[")
        damaged, first = 0, ""
        try:
            while text.next_character() != "]":
                start = text.read
                try:
                    event = text.value()
                except (ValueError, RecursionError, EOFError) as error:
                    if not text.skip_to_next_event():
                        raise
                    damaged += 1
                    first = first or f"trace incomplete: not JSON from character {start:,} to {text.read:,} ({error})"
                    continue
                if isinstance(event, dict):
                    yield event
        finally:
            if damaged:
                more = f"; and in {damaged - 1} more places" if damaged > 1 else ""
                self.lacks.append(first[: 200 - len(more)] + more)
        text.expect("]")


class _Text:
    """A JSON text that arrives in pieces, of which as little is kept as one value needs."""

    def __init__(self, pieces: Iterator[str]):
        self.pieces, self.buffer = pieces, ""
        self.position = self.dropped = 0

    @property
    def read(self) -> int:
        """Characters behind us."""
        return self.dropped + self.position

    def _more(self) -> bool:
        if piece := next(self.pieces, ""):
            self.dropped += self.position
            self.buffer, self.position = self.buffer[self.position :] + piece, 0
        return bool(piece)

    def next_character(self) -> str:
        """The next one that is neither space nor comma; it stays. Raises EOFError at the end."""
        while True:
            self.position = _SEPARATORS.match(self.buffer, self.position).end()
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._more():
                raise EOFError

    def expect(self, character: str) -> None:
        """Step over `character`. Raises ValueError where there is another."""
        found = self.next_character()
        if found != character:
            raise ValueError(f"expected {character!r}, found {found!r}")
        self.position += 1

    def value(self) -> Any:
        """The next JSON value. Raises ValueError, RecursionError for a value nested too deep, EOFError at the end."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError:
                # A value that is cut off here looks like one that is wrong: only more text can tell.
                if len(self.buffer) - self.position > LARGEST_VALUE:
                    raise
            else:
                if end < len(self.buffer) or self.buffer[end - 1] in '}]"':  # else a number may go on
                    self.position = end
                    return value
            if not self._more():
                raise EOFError

    def skip_to_next_event(self) -> bool:
        """Go to where an event may begin behind the one that is next; False, and stay, where there is no such place."""
        start = self.read
        while not (border := _NEXT_EVENT.search(self.buffer, self.position)):
            self.position = max(self.position, len(self.buffer) - _LONGEST_BORDER)
            if not self._more():
                self.dropped, self.buffer, self.position = start, "", 0
                return False
        self.position = border.end()
        return True
