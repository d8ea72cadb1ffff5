"""Small models with random weights, saved as training saves them."""

import torch

import clcr
from clcr.config import ModelConfig
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs


def small_model(folder, store, name="concat", seed=0, tasks=None):
    """A model of a store's features and tasks (or of other ones, by name), in a folder of its own."""
    torch.manual_seed(seed)
    config = clcr.CLCRConfig(ModelConfig(width=16, heads=2))
    model = clcr.build(name, config, feature_specs(store), tasks or task_specs(store)).eval()
    with torch.no_grad():  # answers that differ from clip to clip
        for parameter in model.parameters():
            parameter.mul_(2.5 if parameter.ndim > 1 else 1)
    loader = SplitLoader(store, "train", model.features, task_specs(store), LoaderConfig(), batch_size=8)
    model.fit_statistics(loader.sample_batches(16))
    model.prepare_evaluation(loader.sample_batches)
    clcr.save(model, folder, store.spec.to_dict())
    return model
