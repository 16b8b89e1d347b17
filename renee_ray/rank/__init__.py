"""One rank among others: its rows of a batch, threads and times; what ranks do together."""
