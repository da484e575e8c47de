"""Arrays in, arrays out: no gRPC, no asyncio. One operation per file, or per folder where it has several versions.

Importing this package, or the front of an operation, imports neither numba nor CuPy: `backend` loads a version when
it first runs, and `operations.warm_up` makes that happen at start instead of in the first request.
"""

# shoal/own_packages.py tells this package by this line from a foreign one of the same name.
__distribution__ = "shoal"
