"""The response cache: results that are kept, what they are kept under, and where (docs/requests.md)."""
