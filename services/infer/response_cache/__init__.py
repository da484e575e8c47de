"""The response cache: answers that are kept, what they are kept under, and where (docs/requests.md)."""
