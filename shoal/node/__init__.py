"""One node on one machine: the parts it is made of, and what starts, watches and stops them."""
