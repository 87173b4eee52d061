"""``python -m ume_models``: the ``ume`` command."""

from ume_models.cli.root import main

main()
