"""The worker imports `tasks.py` of each app."""

from asyncmq_nats import task


@task(queue="shop", retries=5)
def send_receipt(order_id: int) -> str:
    from shop.models import Order

    order = Order.objects.get(pk=order_id)
    order.receipt = f"receipt for {order.customer}"
    order.save()
    return order.receipt


@task(queue="shop")
async def greet(name: str) -> str:
    return f"Welcome, {name}"
