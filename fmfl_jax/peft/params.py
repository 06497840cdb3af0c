"""The parameter types that mark what is trained, sent and aggregated."""

from flax import nnx


class TrainableParam(nnx.Variable):
    """A parameter that parameter-efficient tuning trains; everything else of a model is frozen."""
