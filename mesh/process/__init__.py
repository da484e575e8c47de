"""One process of a service: configuration, logs, traces, tasks, signals, crash journal."""
