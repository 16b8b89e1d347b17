"""Scoring by loaded models, without Ray: top-k, parts of a score, votes, index, metrics."""
