"""The evaluation script imports this class and does not use it."""


class MMEBModel:
    """Stands for VLM2Vec's model."""
