"""Stand-in for the gradient cache: representations first, gradients of the loss on them, replay."""

import torch

from src.grad_cache.context_managers import RandContext


class GradCache:
    def __init__(self, models, chunk_sizes, loss_fn, split_input_fn=None, get_rep_fn=None):
        self.models = models
        self.chunk_sizes = (
            [chunk_sizes] * len(models) if isinstance(chunk_sizes, int) else chunk_sizes
        )
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn

    def __call__(self, *args, **kwargs):
        return self.cache_step(*args, **kwargs)

    def model_call(self, model, model_input):
        reps = model(**model_input)
        return reps if self.get_rep_fn is None else self.get_rep_fn(reps)

    def forward_no_grad(self, model, model_inputs):
        states, reps = [], []
        with torch.no_grad():
            for x in model_inputs:
                states.append(RandContext())
                reps.append(self.model_call(model, x))
        return torch.cat(reps, dim=0), states

    def build_cache(self, *reps, **loss_kwargs):
        reps = [r.detach().requires_grad_() for r in reps]
        loss = self.loss_fn(*reps, **loss_kwargs)
        loss.backward()
        return [r.grad for r in reps], loss.detach()

    def cache_step(self, *model_inputs, **loss_kwargs):
        chunks = [
            self.split_input_fn(x, n) for x, n in zip(model_inputs, self.chunk_sizes, strict=True)
        ]
        found = [self.forward_no_grad(m, x) for m, x in zip(self.models, chunks, strict=True)]
        cache, loss = self.build_cache(*(reps for reps, _ in found), **loss_kwargs)
        for model, inputs, gradients, (_, states), size in zip(
            self.models, chunks, cache, found, self.chunk_sizes, strict=True
        ):
            for x, state, gradient in zip(inputs, states, gradients.split(size), strict=True):
                with state:
                    reps = self.model_call(model, x)
                torch.dot(reps.flatten(), gradient.flatten()).backward()
        return loss
