"""`renee-ray doctor`: probes that run on each node, and what is wrong by what they found."""
