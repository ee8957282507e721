"""The tables of the shop."""

from django.db import models


class Order(models.Model):
    """What a customer wants."""

    item = models.CharField(max_length=100)
    state = models.CharField(max_length=20, default="placed")

    class Meta:
        app_label = "django_shop"


class Stock(models.Model):
    """How many pieces there are."""

    item = models.CharField(max_length=100, unique=True)
    pieces = models.PositiveIntegerField()

    class Meta:
        app_label = "django_shop"
