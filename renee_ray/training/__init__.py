"""The training loop of one rank, over any iterator of batches; no Ray."""
