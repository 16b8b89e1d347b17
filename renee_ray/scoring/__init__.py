"""Scoring by loaded models, without Ray: top-k across shards, votes, index, metrics."""
