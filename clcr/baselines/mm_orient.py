"""MM-ORIENT: modalities that never read each other, related through whose neighbours they are (arXiv 2508.16300).

    relations   features of m averaged over a clip's neighbours in every modality's graph        (CMRL, `relation`)
    attention   over a clip's tokens, then over clips, in each modality alone                    (HIMA, `hima`)
    y^ = head_task(f(relations concat attention concat side features))                           one f for all tasks

Noise in one modality reaches another only as a wrong neighbour. Both parts look at other clips: in training at those of
the step (of all workers), in prediction at a bank of training clips that is stored with the model, so that what is
predicted for a clip does not depend on its batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from clcr.base import MultimodalModel, Output
from clcr.baselines.hima import ClipAttention, TokenAttention
from clcr.baselines.relation import Clips, GlobalEmbedding, Relations
from clcr.batches import Batch, Features, FeatureSpec
from clcr.config import CLCRConfig, pairs
from clcr.errors import ConfigError
from clcr.hierarchy import masked_mean
from clcr.precision import exactly
from clcr.stems import Standardise
from clcr.tasks import TaskSpec


class MMOrient(MultimodalModel):
    """Tasks of whole clips, all read from one representation; a missing modality is zeros and nobody's neighbour."""

    bank_nodes: Tensor  # all three are buffers
    bank_pooled: Tensor
    bank_present: Tensor
    embeddings: Any  # a ModuleList of GlobalEmbedding; torch has no type for the items of one
    side: Any  # likewise, a ModuleDict of Standardise

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        options, width, dropout = config.mm_orient, config.model.width, config.model.dropout
        if events := [name for name, task in tasks.items() if task.rate]:
            raise ConfigError(f"mm_orient predicts whole clips, not task {events[0]} per bin: leave it out of --tasks")
        given = pairs(options.embeddings, "mm-orient.embeddings")
        token_modalities = _token_modalities(features, given, options.side)
        super().__init__(config, token_modalities, tasks, levels=[config.model.levels - 1])
        self.features = dict(features)
        # Of each modality: where its global embedding comes from, which is itself where no other is named.
        self.sources = {m: given.get(m, m) for m in token_modalities}
        m = len(token_modalities)
        self.embeddings = nn.ModuleList(GlobalEmbedding(features[source], options) for source in self.sources.values())
        self.nodes = nn.ModuleList(
            nn.Linear(embedding.dim, width) if name != source else nn.Identity()
            for embedding, (name, source) in zip(self.embeddings, self.sources.items(), strict=True)
        )
        released = options.attention == "released"
        self.relations = Relations(m, width, options.sage == "normalised")
        self.token_attention = nn.ModuleList(TokenAttention(width, released) for _ in range(m))
        self.clip_attention = nn.ModuleList(nn.Identity() if released else ClipAttention(width) for _ in range(m))
        self.side = nn.ModuleDict({name: Standardise(*features[name].shape) for name in options.side})
        joined = (m * m + m) * width + sum(features[name].shape[0] for name in options.side)
        self.trunk = nn.Sequential(
            nn.LayerNorm(joined),  # without it, it stuck at two thirds of a problem of three classes
            *(nn.Linear(joined, width), nn.GELU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)),
        )
        self.heads = nn.ModuleList(nn.Linear(width, task.outputs) for task in tasks.values())
        # An empty bank: every clip is its own only neighbour.
        for i, embedding in enumerate(self.embeddings):
            self.register_buffer(f"bank_embedding_{i}", torch.zeros(options.bank, embedding.dim))
        self.register_buffer("bank_nodes", torch.zeros(options.bank, m, width))
        self.register_buffer("bank_pooled", torch.zeros(options.bank, m, width))
        self.register_buffer("bank_present", torch.zeros(options.bank, m, dtype=torch.bool))

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch."""
        clips = self._clips(batch)
        if self.training or self.config.mm_orient.reference == "batch":
            others, own = clips.of_all_workers()
        else:
            others = self.bank
            own = torch.zeros(clips.nodes.shape[0], len(others.nodes), dtype=torch.bool, device=clips.nodes.device)
        links, attended = [], []
        for m, (embedding, attention) in enumerate(zip(self.embeddings, self.clip_attention, strict=True)):
            comparable = others.present[:, m] & clips.present[:, m, None] & ~own
            links.append(embedding.links(clips.embeddings[m], others.embeddings[m]) & comparable)
            pooled = clips.pooled[:, m]
            two_stage = isinstance(attention, ClipAttention)
            attended.append(attention(pooled, others.pooled[:, m], comparable) if two_stage else pooled)
        relations = self.relations(clips, others, links)
        hidden = self.trunk(torch.cat([relations.flatten(1), *attended, *self._side(batch)], dim=1))
        return Output(logits={name: exactly(head, hidden) for name, head in zip(self.tasks, self.heads, strict=True)})

    @property
    def bank(self) -> Clips:
        """The training clips that predictions are made among."""
        embeddings = [getattr(self, f"bank_embedding_{i}") for i in range(len(self.embeddings))]
        return Clips(embeddings, self.bank_nodes, self.bank_pooled, self.bank_present)

    @torch.no_grad()
    def prepare_evaluation(self, sample: Callable[[int], Iterable[Batch]]) -> None:
        """Fill the bank with a seeded sample of training clips, as the model sees them now."""
        if self.config.mm_orient.reference == "batch":
            return
        bank, training, filled = self.bank, self.training, 0
        bank.present.zero_()
        self.eval()
        for batch in sample(len(bank.nodes)):
            clips = self._clips(batch.to(bank.nodes.device))
            rows = slice(filled, filled + len(batch))
            for stored, new in zip([*bank.embeddings, *bank[1:]], [*clips.embeddings, *clips[1:]], strict=True):
                stored[rows] = new
            filled = rows.stop
        self.train(training)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Batch], labels: Mapping[str, ArrayLike] | None = None) -> None:
        """Set all standardisations, units and the graphs' thresholds from training batches; labels: as in the base."""

        def observed() -> Iterator[Batch]:
            for batch in batches:
                for embedding, source in zip(self.embeddings, self.sources.values(), strict=True):
                    embedding.observe(batch.features[source])
                for name, standardise in self.side.items():
                    standardise.observe(batch.features[name].values, batch.features[name].valid)
                yield batch

        super().fit_statistics(observed(), labels)
        for part in (*self.embeddings, *self.side.values()):
            part.fit()

    def _clips(self, batch: Batch) -> Clips:
        (deepest,) = self.encoder(batch)
        present = [batch.present[name] & batch.present[source] for name, source in self.sources.items()]
        embeddings, nodes, pooled = [], [], []
        for m, (name, source) in enumerate(self.sources.items()):
            tokens, features = deepest[name], batch.features[source]
            known = Features(features.values, features.valid & present[m][:, None])
            vector = self.embeddings[m].vector(known)
            embeddings.append(F.normalize(vector, dim=-1))
            nodes.append(self.nodes[m](vector if name != source else masked_mean(tokens.values, tokens.valid)))
            pooled.append(self.token_attention[m](tokens.values, tokens.valid))
        return Clips(
            embeddings, torch.stack(nodes, dim=1).float(), torch.stack(pooled, dim=1), torch.stack(present, dim=1)
        )

    def _side(self, batch: Batch) -> list[Tensor]:
        """The side features of each modality that is one, (B, S), zeros where missing."""
        vectors = []
        for name, standardise in self.side.items():
            features = batch.features[name]
            valid = features.valid & batch.present[name][:, None]
            vectors.append(masked_mean(standardise(features.values), valid))
        return vectors


def _token_modalities(
    features: Mapping[str, FeatureSpec], embeddings: Mapping[str, str], side: tuple[str, ...]
) -> dict[str, FeatureSpec]:
    """The modalities that are encoded: all but those that are another's embedding or side features."""
    for option, names in (("embeddings", [*embeddings, *embeddings.values()]), ("side", side)):
        if unknown := [name for name in names if name not in features]:
            raise ConfigError(f"--mm-orient.{option}: no modality {unknown[0]}; there are {', '.join(features)}")
    vectors = [*embeddings.values(), *side]
    if shaped := [name for name in vectors if len(features[name].shape) != 1]:
        raise ConfigError(f"--mm-orient: {shaped[0]} is no vector but of shape {features[shaped[0]].shape}")
    tokens = {name: spec for name, spec in features.items() if name not in vectors}
    if len(tokens) < 2:
        raise ConfigError(f"mm_orient relates modalities to each other: it needs two or more, got {list(tokens)}")
    return tokens
