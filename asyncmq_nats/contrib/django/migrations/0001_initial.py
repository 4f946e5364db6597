"""The table of the outbox."""

from typing import Any, ClassVar

from django.db import migrations, models

IS_OPEN = models.Q(error__isnull=True, published_at__isnull=True)


class Migration(migrations.Migration):
    """Make the table."""

    initial = True
    dependencies: ClassVar[list[Any]] = []
    operations: ClassVar[list[Any]] = [
        migrations.CreateModel(
            name="OutboxRow",
            fields=[
                ("number", models.BigAutoField(primary_key=True, serialize=False)),
                ("job_id", models.CharField(max_length=200)),
                ("queue", models.CharField(max_length=64)),
                ("order_key", models.CharField(blank=True, max_length=200, null=True)),
                ("body", models.TextField()),
                ("created_at", models.FloatField()),
                ("taken_by", models.CharField(blank=True, max_length=64, null=True)),
                ("taken_until", models.FloatField(blank=True, null=True)),
                ("published_at", models.FloatField(blank=True, null=True)),
                ("error", models.TextField(blank=True, null=True)),
            ],
            options={
                "verbose_name": "outbox row",
                "db_table": "asyncmq_nats_outbox",
                "indexes": [
                    models.Index(
                        condition=IS_OPEN, fields=["number"], name="asyncmq_nats_outbox_open"
                    ),
                    models.Index(
                        condition=models.Q(order_key__isnull=False),
                        fields=["queue", "order_key", "number"],
                        name="asyncmq_nats_outbox_key",
                    ),
                ],
            },
        )
    ]
