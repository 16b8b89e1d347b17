"""`serve`: a run behind HTTP, on Ray Serve."""
