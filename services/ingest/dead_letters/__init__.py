"""Dead letters, jobs that ended without an answer: listed, inspected, requeued or removed."""
