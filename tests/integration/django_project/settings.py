"""Settings of the project: the database is given by the environment, as in a deployment."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

_address = urlsplit(os.environ["DJANGO_DATABASE"])

SECRET_KEY = "of a test"
USE_TZ = True
ROOT_URLCONF = "tests.integration.django_project.urls"
ALLOWED_HOSTS = ["testserver"]
INSTALLED_APPS = ["tests.integration.django_project.orders"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _address.path[1:],
        "USER": _address.username,
        "PASSWORD": unquote(_address.password or ""),
        "HOST": _address.hostname,
        "PORT": _address.port,
    }
}
