"""Loading of a model version: its configuration completed, its files loaded, warmed up and tried."""
