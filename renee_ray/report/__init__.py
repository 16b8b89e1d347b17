"""What people read of datasets, plans and runs: tables for a terminal, HTML pages."""
