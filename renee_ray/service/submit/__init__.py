"""`submit`: a command as a job on a cluster, and what the job takes along."""
