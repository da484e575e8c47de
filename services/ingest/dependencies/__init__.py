"""Jobs that wait for others: what they refer to, when they may run, and how the end of one spreads."""
