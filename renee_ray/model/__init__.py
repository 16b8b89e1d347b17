"""The model of one rank: encoder, shard of the classifier, and their first weights."""
