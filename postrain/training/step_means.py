"""The metrics of the updates between two lines of metrics.jsonl as those of one line."""

import math
from collections.abc import Mapping
from typing import Any

from postrain.sharding import to_host

_LAST = "train/learning_rate"
_EACH_ONCE = ("train/weight", "train/grad_norm")  # no means over what is trained; also train/weights_moved


class StepMeans:
    """Means of the ``train/`` metrics of updates. Each counts by its own weight, ``weight_of/NAME``, and the loss by
    ``train/weight``, as tokens or pairs do in it: the means are then those of all these batches as one. (Not quite the
    sum of several losses, of which that is the first one's weight.)

    A metric of weight 0 is a mean of nothing, such as the reward of desirable answers in an update without one: it is
    left out. Norms and weights count once an update; of the learning rate the last stands. A value that is not finite,
    of a step that was skipped, counts only while there is no other. Of one update the values are its own.
    """

    def __init__(self, saved: Mapping[str, list[float]] | None = None):
        """``saved``: of the updates before, from ``to_json``."""
        self._means = {name: (mean, weight) for name, (mean, weight) in (saved or {}).items()}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of an update, scalars on the device or the host. Waits for them."""
        values = {name: float(to_host(value)) for name, value in metrics.items() if name.startswith("train/")}
        for name, value in values.items():
            weight = 1.0 if name.startswith(_EACH_ONCE) else values.get("train/weight", 1.0)
            if (own := metrics.get(name.replace("train/", "weight_of/", 1))) is not None:
                weight = float(to_host(own))
                if not weight:
                    continue
            mean, total = self._means.get(name, (value, 0.0))
            if not math.isfinite(value):
                weight = 0.0
            if not total or name == _LAST:
                mean = value
            elif weight:
                mean += (value - mean) * weight / (total + weight)
            self._means[name] = (mean, total + weight)

    def values(self) -> dict[str, float]:
        return {name: mean for name, (mean, _) in self._means.items()}

    def to_json(self) -> dict[str, list[float]]:
        """The means and their weights: a run that is started again logs what one that was never stopped would."""
        return {name: [mean, weight] for name, (mean, weight) in self._means.items()}
