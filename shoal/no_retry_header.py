"""Header with which a client forbids the nodes to repeat its call on another instance."""

from __future__ import annotations

NO_RETRY_HEADER = "x-shoal-no-retry"
