"""Which experts the next layer will need: one file a predictor, one interface for the engine and the simulator."""

from moekit.serve.predictors.base import PREDICTORS, Predictor, Seen, predictor_named

__all__ = ["PREDICTORS", "Predictor", "Seen", "predictor_named"]
