"""A run's metrics on Weights & Biases: a mirror of metrics.jsonl, which may fail without stopping the run."""

import dataclasses

from training.signals import say


class Wandb:
    """The W&B run of a training run; `id` names it, so that a resume goes on with the same one.

    run_id: the id that run.json keeps of an earlier part, or None. What W&B cannot do (no login, no network) is said in
    one line; from then on the run has its own record alone.
    """

    def __init__(self, settings, folder, run_id=None):
        import wandb

        self.run, self.id = None, run_id
        try:
            self.run = wandb.init(
                entity=settings.wandb_entity or None,
                project=settings.wandb_project,
                name=settings.wandb_run_name or folder.name,
                config=dataclasses.asdict(settings),
                dir=str(folder),
                id=run_id,
                resume="allow",
            )
            self.id = self.run.id
        except Exception as error:  # of any kind of its own
            self._give_up(error)

    def log(self, metrics):
        if self.run:
            try:
                self.run.log(mirrored(metrics), step=metrics["step"])
            except Exception as error:
                self._give_up(error)

    def finish(self):
        if self.run:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error):
        why = str(error).strip().partition("\n")[0]
        say(f"note: W&B: {why}; the run keeps its own record; log in with `wandb login`, or set WANDB_MODE=offline")
        self.run = None


def mirrored(metrics):
    """A line of metrics.jsonl under the keys that the original's notebooks read.

    The errors by position are one number each (eval_pointwise/loss.31), and beside them stands what the original calls
    eval/non_emb_compute, our paper_compute.
    """
    if "eval_pointwise/loss" not in metrics:
        return metrics
    by_position = {str(i): error for i, error in enumerate(metrics["eval_pointwise/loss"])}
    return metrics | {"eval_pointwise/loss": by_position, "eval/non_emb_compute": metrics["paper_compute"]}
