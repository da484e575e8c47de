"""How much each tenant's results take, and how much they may."""
