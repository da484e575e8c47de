"""The four services. Each runs as a process of its own (`python -m services.store`) and imports no other."""
