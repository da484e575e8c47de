"""Access: the policy document, the decision about a call, and the keys that callers present."""
