"""Results, retention, exports and backups of the client."""
