"""What every service stands on, and what joins them. Knows no service."""
