"""Configurations of all commands: sections and keys, YAML files and `key=value` overrides."""
