"""The `shoal` command line. Each command is a thin shell over the client or the node launcher."""
