"""Model registry: models, their versions and aliases."""
