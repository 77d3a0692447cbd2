"""The files of a run's record, read: by a resume, by sweeps and by figures alike (DESIGN 9)."""

import json

from structured.errors import BadInput

FIELDS = {"command": str, "argv": list, "settings": dict, "status": str}  # what every reader may rely on


def read_record(folder):
    """The dict of a run.json. Raises BadInput that names the file unless it is the record of a run."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); make its run again") from None
    if not isinstance(record, dict):
        raise BadInput(f"{path} is not the record of a run: it is {_kind(record)}, not an object")
    lacking = [name for name in FIELDS if name not in record]
    if lacking:
        raise BadInput(f"{path} is not the record of a run: it has no {', '.join(lacking)}")
    for name, kind in FIELDS.items():
        if not isinstance(value := record[name], kind):
            raise BadInput(f"{path} is not the record of a run: its {name} is {_kind(value)}, not {kind.__name__}")
    return record


def read_metrics(folder):
    """The lines of a metrics.jsonl as dicts, none where there is no such file.

    A last line cut short by a kill is left out. Raises BadInput that names any other line that is not an object with a
    whole number `step`.
    """
    path = folder / "metrics.jsonl"
    try:
        texts = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({type(error).__name__})") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(texts):
                break
            raise BadInput(f"{path}, line {number} is damaged; without that line the file can be read") from None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            what = _kind(line) if not isinstance(line, dict) else f"step {line.get('step')!r}"
            raise BadInput(f"{path}, line {number} has {what}, not an object with a whole number as its step")
        lines.append(line)
    return lines


def _kind(value):
    return type(value).__name__
