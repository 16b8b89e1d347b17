"""How the numbers of a shard lie in memory, are read and rounded, and which of it a GPU can do."""
