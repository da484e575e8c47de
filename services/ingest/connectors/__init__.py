"""Connectors: messages of a broker become jobs, and the results of the jobs are sent to a broker.

    source ──receive──> decode ──> submit (key: the message's location) ──> the job ends ──> encode ──> sink
       ^                                                                                                 │
       └────────────────── settle: only now may the source commit the message ──────────────────────────┘

A message without an answer is sent to the dead letters with the reason, and is then settled, so it blocks no
other message. A message that is not settled when a process dies is delivered again. Its job is found by its key, so
each message has exactly one result.
"""
