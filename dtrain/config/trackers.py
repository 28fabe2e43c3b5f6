"""The experiment trackers that metrics can be sent to, and the client that each needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from dtrain.config.clash import Clash

TrackerKind = Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio", "comet"]


@dataclass(frozen=True)
class TrackerClient:
    """The client of a tracker.

    Attributes:
        module: that is imported; dtrain's extra of the tracker's name installs it.
        settings: what decides where the metrics go, for the documentation.
    """

    module: str
    settings: str


TRACKERS: dict[str, TrackerClient] = {
    "tensorboard": TrackerClient("tensorboard", "the folder `tensorboard` of each stage"),
    "wandb": TrackerClient("wandb", "WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE=offline"),
    "mlflow": TrackerClient("mlflow", "MLFLOW_TRACKING_URI"),
    "swanlab": TrackerClient("swanlab", "SWANLAB_API_KEY, SWANLAB_MODE=offline"),
    "trackio": TrackerClient("trackio", "TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL"),
    "comet": TrackerClient("comet_ml", "COMET_API_KEY, COMET_WORKSPACE, COMET_START_ONLINE=0"),
}
assert tuple(TRACKERS) == get_args(TrackerKind)


def check_trackers(kinds: list[TrackerKind]) -> Iterator[Clash]:
    """Trackers whose client is not installed."""
    for kind in dict.fromkeys(kinds):
        if find_spec(TRACKERS[kind].module) is None:
            message = f"the client of {kind} is not installed"
            yield Clash([("monitoring", "report_to")], message, f"pip install 'dtrain[{kind}]'")
