"""Array operations for CPU and GPU, without gRPC or asyncio: one file per operation, or a folder for several versions.

Importing this package, or the package of an operation, imports neither numba nor CuPy. `backend` imports a version at
its first run; `operations.warm_up` moves that cost from the first request to the start.
"""

# shoal/own_packages.py tells this package by this line from a foreign one of the same name.
__distribution__ = "shoal"
