"""Stand-in for the official data module: random token pairs instead of media."""

import torch
from torch.utils.data import Dataset


class LazyPlumeSFTDataset(Dataset):
    def __init__(self, size=4, length=9, vocabulary=80, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.items = [
            {
                side: torch.randint(3, vocabulary, (length + i,), generator=generator)
                for side in ("qry", "pos")
            }
            for i in range(size)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def make_plume_data_module(tokenizer, data_args, **kwargs):
    return {"train_dataset": LazyPlumeSFTDataset(**kwargs), "data_collator": list}
