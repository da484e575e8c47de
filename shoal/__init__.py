"""Shoal: a complete, self-hosted backend for AI applications.

    import shoal

    with shoal.Client() as client:
        result = client.infer("mymodel", {"x": array})

The client is imported on first use: services import `shoal.errors` and the stubs without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AsyncClient", "BFloat16", "Client", "InferRequest", "InferResult", "JobRequest", "JobRetry", "RetryPolicy"]

if TYPE_CHECKING:
    from shoal.client import AsyncClient as AsyncClient
    from shoal.client import BFloat16 as BFloat16
    from shoal.client import Client as Client
    from shoal.client import InferRequest as InferRequest
    from shoal.client import InferResult as InferResult
    from shoal.client import JobRequest as JobRequest
    from shoal.client import JobRetry as JobRetry
    from shoal.client import RetryPolicy as RetryPolicy


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    from shoal import client

    return getattr(client, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
