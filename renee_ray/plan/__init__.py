"""What a run will take: memory of a device, time, network, checkpoints; computed, not measured."""
