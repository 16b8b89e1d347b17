"""The model of one rank: encoder with bag, gradients over ranks, first weights and new labels'."""
