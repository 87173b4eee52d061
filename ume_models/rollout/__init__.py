"""Rollout engine: KV arena, header cache and the batched latent rollout."""
