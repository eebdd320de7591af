"""The commands, one dataclass each; nothing heavy is imported before one of them runs."""
