"""A room with small kernels, good and bad, for the tests of ``ume_kernels.aot``."""
