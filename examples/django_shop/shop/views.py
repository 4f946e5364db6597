from functools import partial

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from asyncmq_nats import sync
from asyncmq_nats.contrib.django import outbox
from shop.models import Order
from shop.tasks import greet, send_receipt

queue = sync.Queue("shop")


@csrf_exempt
@require_POST
def place_order(request: HttpRequest) -> JsonResponse:
    with transaction.atomic():
        order = Order.objects.create(customer=request.POST["customer"])
        job_id = outbox.add(send_receipt, [order.pk])  # one transaction with the order
        if order.customer == "eve":
            transaction.set_rollback(True)
    return JsonResponse({"job": job_id}, status=202)


@csrf_exempt
@require_POST
def register(request: HttpRequest) -> JsonResponse:
    with transaction.atomic():
        # … store the user; lost if this process dies between the commit and the call
        transaction.on_commit(partial(sync.enqueue, greet, request.POST["name"]))
    return JsonResponse({}, status=202)


def show_job(request: HttpRequest, job_id: str) -> JsonResponse:
    job = queue.get_job(job_id)
    if job is None:
        return JsonResponse({"state": None}, status=404)
    return JsonResponse({"state": job["status"], "result": job["result"]})


def count_jobs(request: HttpRequest) -> JsonResponse:
    return JsonResponse(queue.queue_stats())
