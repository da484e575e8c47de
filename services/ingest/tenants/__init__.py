"""Settings of tenants, and the quotas and rates that follow from them."""
