"""What a run will take, computed (memory, time, network), and settings by themselves."""
