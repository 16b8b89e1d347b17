"""`evaluate`, `predict`, `export`, and the baselines that `quickstart` compares with."""
