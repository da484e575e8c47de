"""Streams: messages of a broker become jobs, and their results go back to one.

    source ──receive──> decode ──> submit (key: where the message lies) ──> the job ends ──> encode ──> sink
       ^                                                                                                 │
       └────────────────── settle: only now may the source forget the message ──────────────────────────┘

A message that cannot be answered goes to the dead letters, with the reason, and is settled then: it blocks nobody. What
is not settled when a process dies is delivered again, finds its job by its key, and has the same, one result.
"""
