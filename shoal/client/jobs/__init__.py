"""Jobs, batches, schedules, dead letters and connectors of the client."""
