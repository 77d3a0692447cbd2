"""Settings: defaults in a dataclass, then config files, then --key=value flags, in the order they are given.

A settings class is a dataclass whose fields are made with `setting(default, "one sentence")`. Config files are Python
programs, run as they are, and hold assignments, only deltas. `--key value` is --key=value, and `--key` alone turns a
switch on. Unknown names, wrong types and numbers that are not finite stop at once and name the nearest right thing.
A config file may read the settings that hold before it, and `os` and `np`: those of nanoGPT and of the paper's code do.

Of a settings class ALIASES are other names of settings, ANSWERS other names and what to do instead, and NEEDS settings
that mean nothing unless another is given, each with that other and a hint.
"""

import builtins
import dataclasses
import difflib
import math
import os
import runpy
import sys
from ast import literal_eval
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import numpy as np

from training.errors import BadInput


def setting(default, text, *, free=False, before=None):
    """A field of a settings class. A `free` setting does not change what is computed, so a resume may change it.

    before: what runs did that were made before there was such a setting. None: nothing that could be resumed.
    """
    return dataclasses.field(default=default, metadata=dict(help=text, free=free, before=before))


def configure(cls, argv=None):
    """Settings from the command line: config files and --key=value flags. --help prints all of them and exits."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    hints, aliases, values, given = get_type_hints(cls), getattr(cls, "ALIASES", {}), {}, {}
    types = {f.name: hints[f.name] for f in dataclasses.fields(cls)}

    def put(key, value, where):
        key = aliases.get(key, key)
        if key in getattr(cls, "ANSWERS", {}):
            raise BadInput(f"{where}: no setting '{key}'; {cls.ANSWERS[key]}")
        if key not in types:
            near = difflib.get_close_matches(key, [*types, *aliases], n=1, cutoff=0.5)
            raise BadInput(f"{where}: no setting '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))
        want = types[key]
        if isinstance(value, np.generic):
            value = value.item()
        if want is float and type(value) is int:
            value = float(value)
        if want is float and value in ("nan", "inf", "-inf"):
            value = float(value)
        if type(value) is not want:
            raise BadInput(f"{where}: {key} takes {want.__name__}, got {value!r}")
        if want is float and not math.isfinite(value):
            raise BadInput(f"{where}: {key} takes a finite number, got {value}")
        if want is int and not -(2**63) <= value < 2**63:
            raise BadInput(f"{where}: {key} takes an integer of 64 bits, got {value}")
        if want is str and "\0" in value:
            raise BadInput(f"{where!r}: {key} has a zero byte")
        values[key] = value if want is not str else _at_home(value)
        given[key] = where

    waiting = list(argv)
    while waiting:
        arg = waiting.pop(0)
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            want = types.get(aliases.get(key, key))
            if not equals and want is not None:
                text = _next_value(arg, want, waiting)
            put(key, text if want is str else _parse(text), arg)
        else:
            known = {f.name: f.default for f in dataclasses.fields(cls)} | values
            known |= {alias: known[key] for alias, key in aliases.items()}
            for key, value in _run_config(arg, known).items():
                put(key, value, arg)
    for key, (needed, hint) in getattr(cls, "NEEDS", {}).items():
        if key in given and needed not in given:
            raise BadInput(f"{given[key]}: {key} means nothing unless {needed} is given; {hint}")
    return cls(**values)


def _next_value(arg, want, waiting):
    """The value of a flag without "=": the argument after it, which it takes; a switch may stand alone."""
    if want is bool and (not waiting or waiting[0].lower() not in ("true", "false")):
        return "True"
    if not waiting or waiting[0].startswith("--"):
        raise BadInput(f"{arg} takes a value: {arg}=VALUE, of type {want.__name__}")
    return waiting.pop(0)


def _at_home(text):
    """A path that begins with ~/, which no shell has seen to after an equals sign, in the home directory."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def help_text(cls):
    """Every setting with its type, default and sentence."""
    fields, types = dataclasses.fields(cls), get_type_hints(cls)
    width = max(len(f.name) for f in fields)
    rows = [f"  --{f.name:<{width}}  {types[f.name].__name__:<5}  {f.metadata['help']} [{f.default!r}]" for f in fields]
    heading = "settings, as --key=value or in a config file [default]:"
    return "\n".join([(cls.__doc__ or "").strip(), "", heading, *rows])


def restored(cls, values):
    """Settings from the dict of a record or checkpoint. BadInput for one of another type, TypeError for an unknown."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise BadInput(f"its setting {name} is {value!r}, of another type than {hints[name].__name__}")
    return cls(**values)


def fits(value, kind):
    """Whether a value can be a setting of that type: its own, or an int for a float."""
    return type(value) is kind or (kind is float and type(value) is int)


def require_at_most(settings, most):
    """Raise BadInput for the first setting above its greatest value; most: {name: value}, of settings that may lack."""
    for name, value in most.items():
        if getattr(settings, name, value) > value:
            raise BadInput(f"{name} is {getattr(settings, name)}, it must be at most {value:,}")


def require_at_least(settings, least):
    """Raise BadInput for the first setting below its least value; least: {name: value}."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise BadInput(f"{name} is {getattr(settings, name)}, it must be at least {value}")


def differences(settings, other):
    """Names of the settings that differ between a settings object and a dict of saved ones, free ones left out."""
    fields = {f.name: f for f in dataclasses.fields(settings)}
    other = {name: f.metadata.get("before") for name, f in fields.items()} | other
    return [name for name, f in fields.items() if not f.metadata["free"] and getattr(settings, name) != other[name]]


def parse_list(text, name, kind=int):
    """"8|4|4" -> (8, 4, 4). Raises BadInput naming the setting."""
    try:
        items = tuple(kind(item) for item in text.split("|"))
    except ValueError:
        items = ()
    if not items or "" in items:
        example = {int: "8|4|4", float: "1e-4|5e-5"}.get(kind, "MHA|SWA")
        raise BadInput(f"{name} is {text!r}; write values with | between them, like \"{example}\"")
    return items


def _parse(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _run_config(path, known):
    """What a config file assigns; the names that are `known` to it are not among that."""
    if not Path(path).is_file():
        raise BadInput(f"no config file '{path}'")
    if Path(path).suffix != ".py":
        raise BadInput(f"{path} is no .py file; config files are Python, a line for each setting: name = value")
    try:
        names = runpy.run_path(path, {"__builtins__": {**vars(builtins), "os": os, "np": np, **known}})
    except SyntaxError as error:
        raise BadInput(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise BadInput(f"{path}: {type(error).__name__}: {error}") from None
    found = {k: v for k, v in names.items() if not (k.startswith("_") or isinstance(v, ModuleType) or callable(v))}
    if not found:
        raise BadInput(f"{path} sets nothing; config files are Python, a line for each setting: name = value")
    return found
