"""The commands of bench.py, one file each, and how they measure."""
