"""Attunement beside PEFT, measured in one process: `python -m benchmarks`."""
