"""A tiny Django project that publishes events from its own transactions."""
