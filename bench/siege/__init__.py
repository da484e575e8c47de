"""Attack suite: bystanders call a small model while an attacker does its worst."""
