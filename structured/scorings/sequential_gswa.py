"""Sequential GSWA: standard attention in some layers, sliding-window attention in the others."""

from dataclasses import dataclass
from typing import ClassVar

from structured.errors import BadInput
from structured.scorings.base import Structure
from structured.scorings.low_rank import LowRankScoring
from structured.scorings.sliding_window import WindowScoring


class SequentialGSWAScoring(Structure):
    """Standard attention in some layers, sliding-window attention in the others, as `layer_kinds` says."""

    label, colour, marker = "sequential GSWA", "#9B5FC0", "v"
    EXAMPLE: ClassVar[dict] = dict(layer_kinds=("MHA", "SWA"), window=5)
    FLAGS = WindowScoring.FLAGS
    POSITIONS = WindowScoring.POSITIONS
    KINDS: ClassVar[dict] = {"MHA": LowRankScoring, "SWA": WindowScoring}

    @dataclass(frozen=True)
    class Settings(WindowScoring.Settings):
        layer_kinds: tuple[str, ...] = ()  # of every layer, MHA or SWA

    @classmethod
    def check(cls, cfg):
        if not cfg.layer_kinds:
            raise BadInput("sequential_GSWA_layer_list is empty; give one of MHA, SWA for each layer")
        for kind in cfg.layer_kinds:
            if kind not in cls.KINDS:
                raise BadInput(f"sequential_GSWA_layer_list has '{kind}', there are {', '.join(cls.KINDS)}")
        if "SWA" in cfg.layer_kinds:
            WindowScoring.check(cfg)

    @staticmethod
    def check_layers(cfg, n_layer):
        kinds = cfg.layer_kinds
        if len(kinds) != n_layer:
            raise BadInput(
                f"sequential_GSWA_layer_list names {len(kinds)} layers {kinds}, the model has n_layer = {n_layer}"
            )

    @classmethod
    def of_layer(cls, cfg, layer):
        if layer >= len(cfg.layer_kinds):
            raise BadInput(f"sequential_GSWA_layer_list has {len(cfg.layer_kinds)} entries, the model has more layers")
        return cls.KINDS[cfg.layer_kinds[layer]](cfg)
