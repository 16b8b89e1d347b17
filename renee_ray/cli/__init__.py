"""The command line: a file for each group of commands; parses, calls the service, prints."""
