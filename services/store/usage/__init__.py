"""How much each tenant's results and payloads take, and how much they may."""
