"""Source folders as others wrote them: text files of the XML repository, and Parquet."""
