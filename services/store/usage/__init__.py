"""Usage and quotas: the storage that each tenant's results and payloads take, and may take."""
