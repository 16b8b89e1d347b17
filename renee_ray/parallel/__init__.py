"""What the ranks of a job do together: collectives, rounds, batches, times by phase."""
