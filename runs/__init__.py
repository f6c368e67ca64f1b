"""A run on disk and over processes: its output directory, checkpoints, records, signals."""
