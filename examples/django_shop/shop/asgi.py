import os

from django.core.asgi import get_asgi_application
from starlette.applications import Starlette
from starlette.routing import Mount

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
site = get_asgi_application()  # reads the settings, so it comes first

from asyncmq_nats.contrib.dashboard import Dashboard  # noqa: E402

application = Starlette(routes=[Mount("/dashboard", Dashboard()), Mount("/", site)])
