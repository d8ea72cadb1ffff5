"""One modality alone: what the others add is measured against this."""

from collections.abc import Mapping

from clcr.baselines.concat import Concat
from clcr.batches import FeatureSpec
from clcr.config import CLCRConfig
from clcr.tasks import TaskSpec


class SingleModality(Concat):
    """The encoder, pooling and heads of one modality; the others of a batch are ignored."""

    def __init__(
        self, modality: str, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]
    ) -> None:
        super().__init__(config, {modality: features[modality]}, tasks)
