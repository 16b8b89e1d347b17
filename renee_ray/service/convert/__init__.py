"""`convert`: source folders -> dataset directories, as Ray Data tasks."""
