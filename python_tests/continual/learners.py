"""What tests of several methods do with a learner."""

import torch

from pcl_ext.data import make_batch


def one_batch(learner, name):
    """16 train examples of a task, in a batch."""
    return make_batch(
        learner.world.dataset,
        learner.world.train_examples(name),
        torch.arange(16),
        learner.model.backbone.config.max_len,
    )
