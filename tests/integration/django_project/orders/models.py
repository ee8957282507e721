"""One table of the application's own."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Order(models.Model):
    """An order; its number is unique."""

    number = models.IntegerField(unique=True)

    class Meta:
        app_label = "orders"
        db_table = "django_orders"
        ordering: ClassVar[list[str]] = ["number"]

    def __str__(self) -> str:
        return f"order {self.number}"
