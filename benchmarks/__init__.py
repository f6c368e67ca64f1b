"""Benchmarks: scripts that print what they measured, against something run side by side."""
