"""The weights of a shard: how their numbers lie in memory, are read, and are rounded."""
