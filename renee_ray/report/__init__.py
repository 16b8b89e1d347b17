"""What people read of datasets and runs: tables of the terminal and the HTML page."""
