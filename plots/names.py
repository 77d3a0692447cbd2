"""Names that figures and tables share: of structures, settings, metrics and axes."""

import dataclasses

import structured
from training.settings import RunSettings, StructureSettings

STRUCTURES = {  # token_mixing_struct: (name, colour, marker)
    structure: (scoring.label, scoring.colour, scoring.marker) for structure, scoring in structured.STRUCTURES.items()
}
STANDARD, MLR = "low_rank", "multi_level_low_rank"  # those that most tables compare
SHARED = [*dataclasses.fields(RunSettings), *dataclasses.fields(StructureSettings)]
IGNORED = {f.name for f in SHARED if f.metadata["free"]} | {  # settings in which the runs of one curve may differ
    "seed", "data_dir", "cuda_graph", "eval_interval", "eval_iters", "eval_only", "eval_prompts", "eval_batch_size",
    "always_save_checkpoint",
}  # fmt: skip
SHORT = {"d_model": "D", "init_lr": "lr", "training_learning_rate": "lr", "max_iters": "steps"}
ICL_RATE, LM_RATE = "training_learning_rate", "init_lr"
LM_LOSS, LOSS_WORDS = "val/loss", "validation loss (nats per token)"  # of its axis
LM_ALIKE = ("dataset", "validation", "val_tokens", "block_size", "max_iters")  # what losses of one comparison share
ICL_SIZES = {"n_dims", "n_positions", "block_size", "d_model"}  # what a figure of in-context regression has in its axes
X_AXES = {  # key of metrics.jsonl: words of the axis
    "non_emb_compute": "training FLOPs without embeddings",
    "compute": "training FLOPs",
    "paper_compute": "forward multiply-adds, the paper's count",
    "seconds": "training time (s)",
    "gpu_seconds": "training time at median pace (s)",  # not in metrics.jsonl: tokens / RecordedRun.pace
    "step": "steps",
}
