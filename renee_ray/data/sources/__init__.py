"""Source folders as others wrote them, as tables of records: text files and Parquet."""
