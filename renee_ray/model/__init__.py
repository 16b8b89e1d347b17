"""The model of one rank: encoder with bag, first weights of the classifier, loss scale."""
