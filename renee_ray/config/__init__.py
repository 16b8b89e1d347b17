"""Configurations: their sections and keys, YAML files and `key=value` overrides."""
