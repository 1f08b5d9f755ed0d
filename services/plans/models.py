"""What a plan may train: the models, and how their parameters lie in one flat vector."""

import itertools
from typing import Annotated, Final, Literal

from pydantic import Field

from services.plans.document import Strict

MAX_VECTOR_LENGTH: Final = 1 << 25


class Network(Strict):
    """A model whose score is the log-odds of the outcome, computed by fully connected layers.

    The parameters are one vector: for each layer its matrix [inputs, outputs] row by row, then its biases. The last
    coordinate is therefore always the intercept of the log-odds. `l2` is the ridge penalty on the mean loss (biases are
    free). `initial_intercept` is the log-odds of the outcome according to public statistics.
    """

    l2: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    initial_intercept: Annotated[float, Field(ge=-20, le=20)] = 0.0

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Units of the hidden layers, from the features on."""
        return ()

    def layers(self, features: int) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every layer; the last one has one output."""
        widths = (features, *self.hidden_layers, 1)
        return tuple(itertools.pairwise(widths))

    def weights_length(self, features: int) -> int:
        """Parameters of the model."""
        return sum((inputs + 1) * outputs for inputs, outputs in self.layers(features))


class LogisticModel(Network):
    """Logistic regression on the plan's features: one weight a feature, the intercept last. All but the intercept start
    at 0."""

    family: Literal["logistic"]


class MlpModel(Network):
    """A multilayer perceptron with one or two hidden layers.

    Matrices start at values drawn uniformly from +-sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010) by `seed`, the
    same at every hospital; biases at 0, the last one at `initial_intercept`.
    """

    family: Literal["mlp"]
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=2)]
    activation: Literal["relu", "tanh"] = "tanh"
    seed: Annotated[int, Field(ge=0, le=1 << 53)] = 0

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return self.hidden


class IntegerVector(Strict):
    """`length` integers that hospitals only sum. For benchmarks of the secure sum: no hospital trains it."""

    family: Literal["integer_vector"]
    length: Annotated[int, Field(ge=1, le=MAX_VECTOR_LENGTH)]


Model = Annotated[LogisticModel | MlpModel | IntegerVector, Field(discriminator="family")]
