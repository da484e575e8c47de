"""From a durable job to its end: claims, attempts, recording, leases."""
