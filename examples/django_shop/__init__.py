"""A Django project whose orders are sagas: ``python -m examples.django_shop``."""
