"""A week of flights out of New York through soma-common, with processes killed on the way.

``python -m examples.flights demo`` is the whole of it. To read: ``events.py`` (what is published), ``projection.py``
(the application: handlers and their tables), then ``demo.py`` (who is killed when, and what must hold in the end).
"""
