"""The operations on a chunk of labels: residuals and updates, for each kind of device."""
