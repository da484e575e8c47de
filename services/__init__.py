"""The four services. Each runs as a process of its own (`python -m services.store`) and imports no other."""

from shoal import own_packages

# shoal/own_packages.py tells this package by this line from a foreign one of the same name.
__distribution__ = "shoal"

# First in every service process: what follows imports `mesh` and `kernels`.
own_packages.exit_when_foreign()
