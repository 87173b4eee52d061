import torch
from torch.utils.checkpoint import get_device_states, set_device_states


class RandContext:
    """The state of the random generators, to draw the same numbers again."""

    def __init__(self, *tensors):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    def __enter__(self):
        self._fork = torch.random.fork_rng(devices=self.devices, enabled=True)
        self._fork.__enter__()
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)

    def __exit__(self, *raised):
        self._fork.__exit__(*raised)
