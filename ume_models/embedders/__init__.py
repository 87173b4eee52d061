"""Embedding models: a prompt, a rollout policy, and the hidden state that is the embedding."""
