"""The model of one rank: encoder with bag, its gradient over ranks, first weights, loss scale."""
