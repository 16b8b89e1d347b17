"""`tune`: its driver, its trials, and the search that chooses their settings."""
