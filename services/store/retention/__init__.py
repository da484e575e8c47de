"""How long results are kept: rules for each kind of thing and tenant, applied by the leader."""
