"""How long jobs stay that have ended, and their removal."""
