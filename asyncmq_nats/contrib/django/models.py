"""The outbox as a model of Django.

The table is that of `asyncmq_nats.contrib.outbox` with SQLAlchemy.
"""

from django.db import models
from django.db.models import Q

from asyncmq_nats.contrib.outbox.rows import MAX_KEY_LENGTH, TABLE

__all__ = ["OutboxRow"]


class OutboxRow(models.Model):
    """A job that is to be added to its queue. Times are Unix seconds of the database."""

    number = models.BigAutoField(primary_key=True)
    job_id = models.CharField(max_length=200)
    queue = models.CharField(max_length=64)
    order_key = models.CharField(max_length=MAX_KEY_LENGTH, null=True, blank=True)
    body = models.TextField()
    created_at = models.FloatField()
    taken_by = models.CharField(max_length=64, null=True, blank=True)
    taken_until = models.FloatField(null=True, blank=True)
    published_at = models.FloatField(null=True, blank=True)
    error = models.TextField(null=True, blank=True)

    class Meta:
        """The table and its indexes."""

        app_label = "asyncmq_nats"
        db_table = TABLE
        verbose_name = "outbox row"
        indexes = (
            models.Index(
                fields=["number"],
                name="asyncmq_nats_outbox_open",
                condition=Q(published_at__isnull=True, error__isnull=True),
            ),
            models.Index(
                fields=["queue", "order_key", "number"],
                name="asyncmq_nats_outbox_key",
                condition=Q(order_key__isnull=False),
            ),
        )

    def __str__(self) -> str:
        return f"{self.job_id} of {self.queue}"
