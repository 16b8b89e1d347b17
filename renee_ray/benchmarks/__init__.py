"""What `bench` times without Ray, and the references that it is measured against."""
