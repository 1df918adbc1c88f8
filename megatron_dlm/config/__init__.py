"""Settings: one dataclass per concern, flags and YAML made from them, and the checks that refuse what cannot work."""
