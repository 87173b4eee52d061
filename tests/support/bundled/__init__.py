"""Training with latent steps, and the script that makes the bundled checkpoint.

``tiny`` is the entry point; ``families`` draws what is learned, ``network`` and ``step`` are the
differentiable model and its losses, ``heldout`` and ``evaluate`` measure it.
"""
