"""Retention as the service offers it: rules that are set and listed, and a leader who has them applied."""

from __future__ import annotations

from collections.abc import Sequence

from services.store.retention.book import RuleBook
from services.store.retention.leadership import Leadership
from services.store.retention.rules import Rule
from services.store.retention.sweep import Sweep, Swept


class Retention:
    """The rules, and the removal of what they no longer keep."""

    def __init__(self, book: RuleBook, sweep: Sweep, leadership: Leadership) -> None:
        self._book = book
        self._sweep = sweep
        self._leadership = leadership

    async def set(self, rule: Rule, *, remove: bool) -> Sequence[Rule]:
        """Sets or removes a rule; all rules after that.

        Raises:
            InvalidArgument: there may be no such rule.
        """
        await self._book.put(rule, remove=remove)
        return await self.list()

    async def list(self) -> Sequence[Rule]:
        """All rules."""
        return (await self._book.read()).rules

    async def apply(self, token: int) -> Swept:
        """Removes for a while on behalf of the leader.

        Raises:
            FailedPrecondition: `token` is not the leader's, or a later leader has acted.
        """
        return await self._sweep.apply(await self._leadership.mandate(token))
