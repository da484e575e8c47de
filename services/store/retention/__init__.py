"""How long results are kept: rules for each kind of thing and tenant, applied by the holder of the leader lease."""
