"""Stand-in for the official entry with activation checkpointing around every sample."""

import sys
from pathlib import Path

import torch.utils.checkpoint as checkpoint_utils

project_root = Path(__file__).parent.parent.parent
sys.path.insert(0, str(project_root))

import plume.train.train_plume as plume_base  # noqa: E402
from plume.train.argument import TrainingArguments  # noqa: E402


class PlumeGradientCheckpointTrainer(plume_base.PlumeTrainer):
    def _single_sample_loss(self, model, prefix_input_ids):
        def _forward_fn(ids):
            return plume_base.PlumeTrainer._single_sample_loss(self, model, ids)

        return checkpoint_utils.checkpoint(_forward_fn, prefix_input_ids, use_reentrant=False)


if __name__ == "__main__":
    folder, report = sys.argv[1:3]
    plume_base.train(
        plume_base.load_model(folder),
        TrainingArguments(report=report),
        trainer_class=PlumeGradientCheckpointTrainer,
    )
