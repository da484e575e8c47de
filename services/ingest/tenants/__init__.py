"""Who may have how much: the settings of tenants, and what they are counted against."""
