"""What each ``ume`` command does. ``ume_models.cli`` has their names, options and help."""
