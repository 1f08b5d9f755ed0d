"""How real numbers become the integers that are summed."""

from typing import Annotated, Literal

from pydantic import Field

from services.plans.document import Strict
from services.secure_sum.parameters import ParameterSet, parameter_set


class Encoding(Strict):
    """How real numbers become the integers that are summed.

    `parameter_set` is that of the secure sum: under the first a hospital encrypts with the key that opens sums, under
    the second with a public key, for twice the bytes. `scale` is integer units per 1.0 of contribution; `metrics_units`
    is integer units per counted encounter in the metrics part. One lane has all the bits of the set's plaintexts per
    coordinate (48 or 44), two lanes half of them each.
    """

    parameter_set: Literal["bfv-n4096-q60-t48-v2", "bfv-n4096-q60-t44-pk-v1"] = "bfv-n4096-q60-t48-v2"
    lanes: Literal[1, 2] = 1
    scale: Annotated[float, Field(ge=1, le=2.0**40)]
    metrics_units: Annotated[int, Field(ge=1, le=1 << 20)] = 16

    @property
    def parameters(self) -> ParameterSet:
        """The set of that name."""
        return parameter_set(self.parameter_set)

    @property
    def bits(self) -> int:
        """Bits of one coordinate, sign included."""
        return self.parameters.plain_modulus_bits // self.lanes
