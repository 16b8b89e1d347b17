"""Reports on datasets and runs for people: tables for a terminal and the HTML page."""
