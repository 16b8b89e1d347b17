"""The k best labels of each embedding, exactly, without all logits in memory."""
