"""A call as the protocol has it, and as arrays: reading requests, writing answers. Knows no model that is loaded."""
