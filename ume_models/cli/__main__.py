"""``python -m ume_models.cli``, as launchers of several processes start it."""

from ume_models.cli.root import main

main()
