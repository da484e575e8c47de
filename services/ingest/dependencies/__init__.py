"""Dependencies between jobs: references, and the decision when a waiting job may run or must end."""
