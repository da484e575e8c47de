"""Real files of many kinds from this machine, in a deterministic selection, and a few generated ones.

A file's kind is its suffix, or follows from its first bytes if it has no suffix. Files are selected round-robin over
the kinds, so that rare kinds are selected before the hundredth Python file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import sqlite3
import struct
import tarfile
import tempfile
import wave
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

# The model uses the first and last few thousand bytes, so larger files would only take longer to read.
LARGEST_BYTES = 4 << 20

# Limit of a walk: /usr/share alone may have hundreds of thousands of files.
_ENTRIES_PER_FOLDER = 1_500

_PER_KIND = 20

# Number of files without a suffix per folder, which must be opened to determine their kind.
_PEEKED = 60

_SUFFIX = re.compile(r"\.[a-z][a-z0-9+]{0,5}$")


@dataclass(frozen=True)
class Sample:
    """A file with its bytes, read once, so that all answers are about the same bytes."""

    name: str
    content: bytes


def gather(folders: Iterable[Path], count: int) -> Iterator[Sample]:
    """Yield up to `count` files: first the generated ones, then files of the folders, round-robin over the kinds."""
    made = [Sample(f"generated/{name}", content) for name, content in make()]
    yield from islice(made, count)
    kinds: dict[str, list[Path]] = {}
    for folder in folders:
        peeks = _PEEKED
        for path in _walk(folder):
            suffix = path.suffix.lower()
            if not _SUFFIX.match(suffix):
                peeks -= 1
                if peeks < 0:
                    continue
                suffix = _peek(path)
            group = kinds.setdefault(suffix, [])
            if len(group) < _PER_KIND:
                group.append(path)
    turns = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    found = (sample for turn in turns for path in turn if path and (sample := _read(path)))
    yield from islice(found, max(count - len(made), 0))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield regular files in and below `folder` by name, without links and caches, up to _ENTRIES_PER_FOLDER."""
    left = _ENTRIES_PER_FOLDER
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        for name in sorted(names):
            left -= 1
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                yield path
        if left <= 0:
            return


def _peek(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return ""
    return "ELF" if start == b"\x7fELF" else "script" if start[:2] == b"#!" else "none"


def _read(path: Path) -> Sample | None:
    """Return the file, or None when the file is empty, too large or unreadable."""
    try:
        size = path.stat().st_size
        return Sample(str(path), path.read_bytes()) if 0 < size <= LARGEST_BYTES else None
    except OSError:
        return None


def make() -> Iterator[tuple[str, bytes]]:
    """Yield name and content of small, valid files of kinds that a minimal machine may lack."""
    text = "".join(f"line {n}: the quick brown fox jumps over the lazy dog\n" for n in range(60))
    yield "archive.zip", _zip({"a.txt": text, "b/c.txt": text * 2})
    yield "archive.tar", _tar({"a.txt": text, "b.txt": text})
    yield "text.gz", gzip.compress(text.encode(), mtime=0)
    yield "text.bz2", bz2.compress(text.encode())
    yield "text.xz", lzma.compress(text.encode())
    yield "picture.png", _png(64, 48)
    yield "picture.bmp", _bmp(64, 48)
    yield "document.pdf", _pdf("A page made by the demo of Shoal")
    yield "tables.sqlite", _sqlite()
    yield "tone.wav", _wav()
    yield "table.csv", "".join(f"{n},{n * n},name {n},2026-01-{n % 28 + 1:02d}\n" for n in range(80)).encode()
    yield "page.html", _html().encode()
    yield "feed.xml", _xml().encode()
    yield "records.json", ("[" + ",".join(f'{{"id": {n}, "tags": ["a", "b"]}}' for n in range(40)) + "]").encode()


def _zip(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _tar(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    return out.getvalue()


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(
        b"\0" + bytes((x * 4 ^ y * 5 ^ c * 90) & 255 for x in range(width) for c in range(3)) for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    rows = bytes((x ^ y) & 255 for y in range(height) for x in range(width * 3))
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rows), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows


def _pdf(line: str) -> bytes:
    stream = f"BT /F1 24 Tf 72 720 Td ({line}) Tj ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return f"{out}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def _sqlite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tables.sqlite")
        with sqlite3.connect(path) as database:
            database.execute("create table fish (id integer primary key, name text, length_mm real)")
            database.executemany("insert into fish values (?, ?, ?)", [(n, f"fish {n}", n * 1.5) for n in range(200)])
        database.close()
        return path.read_bytes()


def _wav() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(b"".join(struct.pack("<h", (n * 337) % 20000 - 10000) for n in range(8000)))
    return out.getvalue()


def _html() -> str:
    rows = "".join(f"<tr><td>{n}</td><td>fish {n}</td></tr>\n" for n in range(40))
    head = "<!DOCTYPE html>\n<html>\n<head><title>Fish</title></head>\n"
    return f"{head}<body>\n<table>\n{rows}</table>\n</body>\n</html>\n"


def _xml() -> str:
    items = "".join(f'  <item id="{n}"><name>fish {n}</name></item>\n' for n in range(40))
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<items>\n{items}</items>\n'
