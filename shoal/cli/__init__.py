"""The `shoal` command line. Each command is a thin layer over the client or the node launcher."""
