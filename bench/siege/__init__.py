"""Attack suite: bystanders call a small model during attacks."""
