"""Verification of the audit log: every entry against its neighbours, every chain against the anchors.

    chain:   first kept entry ──hash──> ... ──hash──> last entry       edited, removed, exchanged entries
             entries before that: a removal is under way               added entries
    anchors: the entry at each anchored end has the anchored hash      cut off or rewritten chains
             each anchor has the hash of the one before                removed or changed anchors

What nobody has anchored yet, the last minutes before an attack, is only protected by the chain that is written now:
this instance knows the end of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from mesh.mongo import Document, translated
from services.store.audit import chains
from services.store.audit.anchors import Anchor, Anchors
from services.store.audit.chain import AuditChain
from services.store.audit.chains import Extent
from services.store.audit.entries import FIRST_HASH, Entry, entry_id, entry_of, fits
from services.store.documents import Collections
from shoal.errors import DataLoss

MAX_PROBLEMS = 1_000
"""Problems of one chain that are reported; its verification ends there."""
_STEP = 2_000
_ADDED = "is before the first entry that is kept, and unproven: it was added, or its removal was interrupted"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written."""

    where: str
    """Id of an entry, a chain's writer or `anchor N`."""
    message: str


@dataclass(frozen=True, slots=True)
class Checked:
    """Progress: what was checked since the last one, and the problems found there."""

    entries: int = 0
    anchors: int = 0
    problems: Sequence[Problem] = ()


class AuditVerification:
    """Verifies the log while it grows. `own` is the chain of this process."""

    def __init__(self, collections: Collections, anchors: Anchors, own: AuditChain) -> None:
        self._collections = collections
        self._anchors = anchors
        self._own = own

    async def verify(self) -> AsyncIterator[Checked]:
        """Yield progress until everything is checked. Memory: one anchor, and two numbers and hashes for each extent.

        Raises:
            Unavailable: MongoDB or the blobs are unavailable.
        """
        # Read first: entries that are written later are not missing.
        own = self._own.head
        hashes: dict[str, dict[int, str]] = defaultdict(dict)
        extents: dict[str, Extent] = {}
        named = await self._anchors.strays(MAX_PROBLEMS)
        yield Checked(problems=[Problem(f"anchor {id}", "is no anchor: its id is no number from 1 on") for id in named])
        async for checked, anchor in self._verify_anchors():
            yield checked
            if anchor is not None:
                for writer, one in anchor.chains.items():
                    hashes[writer] |= {one.first - 1: one.before, one.last: one.last_hash}
                extents.update(anchor.chains)
        if own is not None:
            hashes[own.writer][own.n] = own.hash
        with translated("reading the audit log"):
            found = [writer async for writer in chains.writers(self._collections.audit)]
            strays: list[Problem] = []
            async for id_ in chains.strays(self._collections.audit):
                strays.append(Problem(str(id_), "is no entry: no chain has such an id"))
                if len(strays) >= MAX_PROBLEMS:
                    break
        yield Checked(problems=strays)
        for writer in sorted({*found, *hashes}):
            checked = await self._verify_chain(writer, extents.get(writer), hashes[writer])
            if checked.problems and (moved := await self._moved(writer, extents.get(writer))) is not None:
                # Retention has removed entries meanwhile.
                checked = await self._verify_chain(writer, moved, hashes[writer])
            yield checked

    async def _moved(self, writer: str, before: Extent | None) -> Extent | None:
        """Return the chain's extent by an anchor that is newer than `before`; None when that begins no later."""
        try:
            newest = await self._anchors.newest()
        except DataLoss:
            return None
        now = newest.chains.get(writer) if newest is not None else None
        return now if now is not None and now.first > (before.first if before is not None else 1) else None

    async def _verify_anchors(self) -> AsyncIterator[tuple[Checked, Anchor | None]]:
        """Yield each anchor in its order; None when it cannot be read."""
        named = set(await self._anchors.named())
        every = sorted({stored async for stored in self._anchors.stored()} | named)
        if not every:
            return
        # Anchors before the oldest that is kept are being removed.
        oldest = 1
        for stored in reversed(every):
            try:
                oldest = (await self._anchors.read(stored)).oldest
            except DataLoss:
                continue
            break
        hashes: dict[int, set[str]] = {}
        expected = oldest
        for stored in (one for one in every if one.n >= oldest):
            where = f"anchor {stored.n}"
            problems: list[Problem] = []
            anchor: Anchor | None = None
            try:
                anchor = await self._anchors.read(stored)
            except DataLoss as err:
                problems.append(Problem(where, err.message))
            if expected < stored.n:
                more = stored.n - expected - 1
                removed = f"was removed, and {more} after it" if more else "was removed"
                problems.append(Problem(f"anchor {expected}", removed))
            expected = stored.n + 1
            if anchor is not None and stored.n > oldest and anchor.previous not in hashes.get(stored.n - 1, set()):
                problems.append(Problem(where, "does not follow the anchor before it: one of both was exchanged"))
            hashes.setdefault(stored.n, set()).add(stored.sha256)
            yield Checked(anchors=1, problems=problems), anchor

    async def _verify_chain(self, writer: str, anchored: Extent | None, hashes: Mapping[int, str]) -> Checked:
        """Check a chain. `hashes`: those of entries that anchors name, by number."""
        expected, previous = (anchored.first, anchored.before) if anchored is not None else (1, FIRST_HASH)
        last = max(hashes, default=0)
        problems: list[Problem] = []
        entries = await self._verify_before(writer, expected, previous, hashes, problems)
        while len(problems) < MAX_PROBLEMS:
            with translated("reading the audit log"):
                query = chains.range_of(writer, expected)
                docs = await self._collections.audit.find(query).sort("_id", 1).limit(_STEP).to_list()
            for doc in docs:
                expected, previous = _check(doc, writer, expected, previous, hashes, problems)
            entries += len(docs)
            if len(docs) < _STEP:
                break
        if expected <= last and len(problems) < MAX_PROBLEMS:
            missing = f"entries {expected} to {last}" if expected < last else f"entry {last}"
            problems.append(Problem(writer, f"was cut off: {missing} existed"))
        return Checked(entries, problems=problems[:MAX_PROBLEMS])

    async def _verify_before(
        self, writer: str, first: int, before: str, hashes: Mapping[int, str], problems: list[Problem]
    ) -> int:
        """Check the entries before number `first`, which retention removes from the oldest one on. Return their number.

        They must lead up to the hash `before`. What the oldest one of them says is known only while an anchor has the
        hash before it; retention may be about to remove it.
        """
        entries, oldest = 0, None
        with translated("reading the audit log"):
            async with self._collections.audit.find(chains.range_of(writer, 1, first)).sort("_id", -1) as found:
                async for doc in found:
                    entries += 1
                    if (entry := _entry(doc, writer, problems)) is not None:
                        if oldest is None:
                            is_next = (entry.n, entry.hash) == (first - 1, before)
                        else:
                            is_next = entry.n == oldest.n - 1 and fits(oldest, entry.hash)
                        if is_next:
                            oldest = entry
                        else:
                            problems.append(Problem(entry.id, _ADDED))
                    if len(problems) >= MAX_PROBLEMS:
                        return entries
            known = {0: FIRST_HASH, **hashes}
            is_proven = oldest is None or fits(oldest, known.get(oldest.n - 1, ""))
            if oldest is not None and not is_proven and await self._has(oldest.id):
                problems.append(Problem(oldest.id, _ADDED))
        return entries

    async def _has(self, id_: str) -> bool:
        return await self._collections.audit.find_one({"_id": id_}, {"_id": 1}) is not None


def _entry(doc: Document, writer: str, problems: list[Problem]) -> Entry | None:
    """Return the entry of a document between those of `writer`; None when it is none, which is a problem."""
    try:
        entry = entry_of(doc)
        if entry.writer == writer:
            return entry
        why = f"{doc['_id']!r} is no id of an entry"
    except (ValueError, KeyError, TypeError) as err:
        why = str(err)
    problems.append(Problem(str(doc["_id"]), f"is no entry: {why}"))
    return None


def _check(
    doc: Document, writer: str, expected: int, previous: str, hashes: Mapping[int, str], problems: list[Problem]
) -> tuple[int, str]:
    """Check one entry, and return the number and the previous hash that the next one must have."""
    if (entry := _entry(doc, writer, problems)) is None:
        return expected, previous
    if entry.n > expected:
        removed = entry_id(entry.writer, expected)
        more = entry.n - expected - 1
        problems.append(Problem(removed, f"was removed, and {more} after it" if more else "was removed"))
    elif not fits(entry, previous):
        problems.append(Problem(entry.id, "was changed, or the entry before it was exchanged"))
    if hashes.get(entry.n, entry.hash) != entry.hash:
        problems.append(Problem(entry.id, "is not the entry that existed when its chain was anchored"))
    return entry.n + 1, entry.hash
