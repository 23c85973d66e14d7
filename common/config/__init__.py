"""The run config: one module a section, loading from YAML, and the checks across sections."""
