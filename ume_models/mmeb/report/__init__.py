"""Results as people read them: in the terminal, as Markdown, and as one HTML page with pictures.

``terminal``, ``markdown`` and ``page`` tell of one run, ``failures`` adds its galleries, and
``comparison`` tells of two runs in the same three forms.
"""
