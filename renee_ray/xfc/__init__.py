"""The fully connected classifier of one rank: step and top-k of a label shard (the paper)."""
