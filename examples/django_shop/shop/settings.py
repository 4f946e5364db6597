"""Settings: what is special is the app, and ASYNCMQ_NATS."""

import os
from pathlib import Path

SECRET_KEY = "an example has no secrets"
DEBUG = True
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "shop.urls"
ASGI_APPLICATION = "shop.asgi.application"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", Path(__file__).parents[1] / "shop.sqlite3"),
        "OPTIONS": {"timeout": 30},
    }
}
INSTALLED_APPS = ["asyncmq_nats.contrib.django", "shop"]
ASYNCMQ_NATS = {
    "servers": os.environ.get("NATS_URL", "nats://127.0.0.1:4222"),
    "completed_ttl": 7 * 86_400,
}
