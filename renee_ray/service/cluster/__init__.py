"""Work on a cluster, whatever the command: Ray, jobs and tasks, their rows, failures, messages."""
