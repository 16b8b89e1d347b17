"""How the numbers of a shard lie in memory, are read and rounded, and whether a GPU can do it."""
