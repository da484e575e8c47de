"""The whole of what is stored, at one moment, elsewhere; and back again."""
