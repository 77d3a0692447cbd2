"""How a prompt is told to the model: as which tokens, and which of them predict which points."""

from collections.abc import Callable
from dataclasses import dataclass

from data.icl_regression.sampler import interleave, pairs_and_query
from data.icl_regression.tasks import QUERY_TASKS, TASKS


@dataclass(frozen=True)
class Layout:
    """tokens(x, y): (B, points, n_dims), (B, points) -> (B, per_point points, n_dims + extra_inputs).

    predicting: the tokens whose outputs are predictions. predicted: the points whose y they predict.
    """

    tokens: Callable
    per_point: int
    extra_inputs: int
    predicting: slice
    predicted: slice

    def count(self, points):
        """How many predictions a prompt of so many points has."""
        return len(range(points)[self.predicted])


EVERY_X = Layout(interleave, per_point=2, extra_inputs=0, predicting=slice(None, None, 2), predicted=slice(None))
QUERY = Layout(pairs_and_query, per_point=1, extra_inputs=2, predicting=slice(-1, None), predicted=slice(-1, None))
LAYOUTS = dict.fromkeys(TASKS, EVERY_X) | dict.fromkeys(QUERY_TASKS, QUERY)
