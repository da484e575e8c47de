"""Retention: rules for each kind of data and tenant, applied by the holder of the leader lease."""
