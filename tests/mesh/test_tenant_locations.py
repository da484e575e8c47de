"""Locations of a tenant: its own folders, those of all tenants, and never every bucket or the whole machine."""

from __future__ import annotations

import pytest

from mesh.tenant_locations import of_tenant

NAMED = ("s3://data/{tenant}", "file:///shared", "s3://", "file:///", "gs://b-{tenant}/x")


def test_a_tenant_has_the_locations_that_name_it_and_those_of_all() -> None:
    assert of_tenant(NAMED, "acme") == ["s3://data/acme", "file:///shared", "gs://b-acme/x"]


@pytest.mark.parametrize("tenant", ["acme/../globex", "globex/x", ""])
def test_a_name_that_leads_elsewhere_has_only_what_is_all_tenants(tenant: str) -> None:
    assert of_tenant(NAMED, tenant) == ["file:///shared"]
