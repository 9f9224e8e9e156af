"""The map of experts: their axis, and where router rows come from."""

from dataclasses import dataclass

from megagrow.growth.maps.axis import AxisMap, Indices


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """How experts grow.

    Attributes:
        expert: the axis of experts; its source entries are experts, or slices of a dense MLP.
        fresh_rows: [E] row of a fresh router that each expert takes; None: router rows grow with the experts.
        noise: standard deviation of the noise on new router rows, relative to that of the router's entries.
        exact: whether the function is preserved with these top-ks and this noise.
    """

    expert: AxisMap
    fresh_rows: Indices | None = None
    noise: float = 0.0
    exact: bool = True
