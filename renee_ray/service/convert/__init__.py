"""`convert`: source folders -> dataset directories, as Ray Data tasks, with their statistics."""
