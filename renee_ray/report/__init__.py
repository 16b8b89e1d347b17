"""What people read of datasets, plans and runs, from their files: tables, HTML pages."""
