"""The commands that run on Ray: a folder for each large one, a file for each small one."""
