"""What ranks do together (collectives, rounds), and a rank's batches, threads and times."""
