"""Infrastructure of all services: processes, gRPC, etcd, MongoDB, Envoy configuration. Names no service."""

# shoal/own_packages.py tells this package by this line from a foreign one of the same name.
__distribution__ = "shoal"
