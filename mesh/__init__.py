"""What every service stands on, and what joins them. Knows no service."""

# shoal/own_packages.py tells this package by this line from a foreign one of the same name.
__distribution__ = "shoal"
