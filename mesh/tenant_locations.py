"""Storage locations that a verified caller may use, of those that the operator has named.

s3://data/{tenant}  ──acme──> s3://data/acme
s3://, file:///     ──acme──> none: every bucket, or the whole machine, is allowed to no verified caller
"""

from __future__ import annotations

from collections.abc import Sequence

TENANT = "{tenant}"
"""Part of a location's URL that stands for the tenant of a verified caller."""


def of_tenant(urls: Sequence[str], tenant: str) -> list[str]:
    """Return the locations of `urls` for a verified caller of `tenant`. One without `{tenant}` is for all tenants."""
    # A name with a slash could lead into the folder of another tenant.
    named = (url for url in urls if TENANT not in url or (tenant and "/" not in tenant))
    return [url.replace(TENANT, tenant) for url in named if url.partition(":")[2].strip("/")]
