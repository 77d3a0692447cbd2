"""The ETT time series (electricity transformer temperature), which prepare.py leaves in data/ett/<name>/."""

NAMES = ("ETTh1", "ETTh2", "ETTm1", "ETTm2")
COLUMNS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
