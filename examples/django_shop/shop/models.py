from django.db import models


class Order(models.Model):
    id = models.BigAutoField(primary_key=True)
    customer = models.CharField(max_length=100)
    receipt = models.CharField(max_length=100, default="")
