"""Requests of one connection, read by httptools. Everything that two servers could read differently is refused.

    feed_head(head) ──> Head            one whole head, up to its empty line
    feed_body(data) ──> piece, rest     of a chunked body, until `is_complete`

Clients repeat their heads: each is read once, then looked up. A body with a length needs no reading. httptools reads a
pipelined request as well, and does not say where: it gets a chunked body up to an empty line at a time, as one ends it.

httptools itself refuses (400): Content-Length twice, with Transfer-Encoding, or no number; bad sizes of chunks;
obs-fold; NUL, CR or LF within a line; lines that end with LF alone; spaces before a colon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httptools

from mesh.h2.headers import LIST_BYTES, LIST_FIELDS, Block

_ENTRY_BYTES = 32

# httptools refuses methods that it does not know, and applications say which ones a path has: it gets another one.
_METHOD, _READ_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}"), b"POST "

# httptools drops the body of a request with this header: it would be read as the next request.
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)

# Bytes of a chunked body beside its data: sizes of chunks, their extensions, trailers. One byte in a chunk takes five.
_FRAMING_BYTES, _FRAMING_RATIO = 64 << 10, 8

_EMPTY_LINE = b"\r\n\r\n"
# Empty lines of a chunked body up to which it is read at once: 2 ms.
_MAX_FEEDS = 3_000


class BadRequest(Exception):
    """A request that is refused with `status`, and ends its connection."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Head:
    """Head of one request."""

    block: Block
    """The fields as HTTP/2 has them: `:method` and `:path` first, names in small letters."""
    is_http_1_0: bool
    keeps_alive: bool
    expects_continue: bool
    length: int | None
    """Bytes of the body; None for a chunked one."""
    has_response_body: bool
    """False for HEAD."""


# Lines of a head that are no field: the first one, and the empty one at the end.
_OTHER_LINES = 2

# A longer head has a token or a list of its own request: it would displace what repeats.
_KNOWN_BYTES, _KNOWN_FIELDS = 1 << 10, 32
# Known heads of all connections: 2 MiB, with their objects. Beyond it, they are dropped.
_MAX_KNOWN = 256

_known: dict[bytes, Head] = {}


class RequestReader:
    """Reads the requests of one connection, one after the other."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._method = self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._list_bytes = 0
        self._messages = 0
        self._pieces: list[bytes] = []
        self._framing = self._received = 0
        # Bytes of the body that were read last: an empty line may have begun in them.
        self._last = b""
        self._has_head = self._keeps_alive = False
        self.is_complete = False
        """True when the whole body of the last chunked request has arrived."""
        # The parser keeps the callbacks that it finds now.
        self.on_body = self._pieces.append
        self._parser = httptools.HttpRequestParser(self)

    # -- callbacks of httptools

    def on_message_begin(self) -> None:
        self._messages += 1

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are dropped: nobody has checked them.
        if self._has_head:
            return
        self._list_bytes += len(name) + len(value) + _ENTRY_BYTES
        if len(self._fields) < LIST_FIELDS:
            self._fields.append((name.lower(), value.rstrip(b" \t")))
        else:
            self._list_bytes = LIST_BYTES + 1

    def on_headers_complete(self) -> None:
        self._has_head = True
        # Later, httptools has forgotten the connection's headers.
        self._keeps_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        self.is_complete = True

    # -- for the connection

    def feed_head(self, head: bytes) -> Head:
        """Read one whole head. Raises BadRequest."""
        known = _known.get(head)
        if known is not None:
            return known
        # A line costs 0.3 us, and can be four bytes long: they are counted before they are read.
        if head.count(b"\n") > LIST_FIELDS + _OTHER_LINES:
            raise _too_long()
        if self._messages:
            self._begin()
        self._method, _, rest = head.partition(b" ")
        if not _METHOD.fullmatch(self._method):
            raise BadRequest(400, "the request is malformed: expected a method and a space")
        if self._method == b"CONNECT":
            raise BadRequest(501, "this server is no proxy")
        # An upgrade is not made (RFC 9110, section 7.8): the request is served as it is.
        self._feed(_READ_METHOD + _UPGRADE.sub(b"", rest))
        if self._messages > 1 or not self._has_head:
            raise BadRequest(400, "the request is malformed: its head ends where it should not")
        found = self._head()
        if found.length is not None and len(head) <= _KNOWN_BYTES and len(self._fields) <= _KNOWN_FIELDS:
            if len(_known) >= _MAX_KNOWN:
                _known.clear()
            _known[head] = found
        return found

    def feed_body(self, data: bytes) -> tuple[bytes, bytes]:
        """Read a chunked body on. Return its part in `data`, and the rest of `data`, which is not read yet.

        After the end of the body, the rest is of later requests. Raises BadRequest for what is no chunk.
        """
        known = self._last + data
        at = begun = len(self._last)
        searched = 0
        for _ in range(_MAX_FEEDS):
            found = known.find(_EMPTY_LINE, searched)
            end = searched = found + len(_EMPTY_LINE) if found >= 0 else len(known)
            self._feed(known[at:end])
            at = end
            if self.is_complete or at == len(known):
                break
        if self._messages > 1:
            raise BadRequest(400, "another request follows in the chunks of this one")
        self._last = known[max(at - len(_EMPTY_LINE) + 1, 0) : at]
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._received += len(piece)
        self._framing += at - begun - len(piece)
        if self._framing > _FRAMING_BYTES + _FRAMING_RATIO * self._received:
            raise BadRequest(400, "the body has too much around its chunks: send larger ones")
        return piece, known[at:]

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as err:
            raise BadRequest(400, f"the request is malformed: {err}") from err

    def _head(self) -> Head:
        if self._list_bytes > LIST_BYTES:
            raise _too_long()
        method, version = self._method, self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BadRequest(505, "this server speaks HTTP/1.1 and HTTP/2")
        names = [name for name, _ in self._fields]
        if names.count(b"host") != 1 and (version == "1.1" or b"host" in names):
            raise BadRequest(400, "expected one header Host")
        by_name = dict(self._fields)
        encoding, expected = by_name.get(b"transfer-encoding"), by_name.get(b"expect")
        # httptools takes several of these headers for one list, whose last coding is chunked.
        is_listed = names.count(b"transfer-encoding") > 1
        if encoding is not None and (version == "1.0" or is_listed or encoding.lower() != b"chunked"):
            raise BadRequest(501, "of all transfer encodings, only chunked in HTTP/1.1 is supported")
        if expected is not None and expected.lower() != b"100-continue":
            raise BadRequest(417, "the only supported expectation is 100-continue")
        block = Block(
            [(b":method", method), (b":path", _target(self._url)), *self._fields], self._list_bytes + len(self._url)
        )
        length = None if encoding is not None else int(by_name.get(b"content-length", b"0"))
        is_1_0 = version == "1.0"
        expects_continue = expected is not None and not is_1_0
        return Head(block, is_1_0, self._keeps_alive, expects_continue, length, method != b"HEAD")


def _too_long() -> BadRequest:
    return BadRequest(431, f"headers of more than {LIST_BYTES} bytes, or {LIST_FIELDS} fields: send less")


def _target(url: bytes) -> bytes:
    """Return the path and query of a request target (RFC 9112, section 3.2). Raises BadRequest."""
    if b"#" in url:
        raise BadRequest(400, "a fragment is no part of a request")
    if url.startswith((b"http://", b"https://")):
        _, _, rest = url.partition(b"://")
        slash = rest.find(b"/")
        return rest[slash:] if slash >= 0 else b"/"
    if url[:1] != b"/" and url != b"*":
        raise BadRequest(400, "expected a path that begins with a slash")
    return url
