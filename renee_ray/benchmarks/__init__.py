"""What `bench` times without Ray: its problems, and the references it is measured against."""
