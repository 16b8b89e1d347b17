"""Files as others wrote them, as tables of records: repository folders, tables, JSON, memmaps."""
