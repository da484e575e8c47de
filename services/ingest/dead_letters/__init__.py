"""What became of jobs that ended without an answer: listed, looked into, put into the queue again, or removed."""
