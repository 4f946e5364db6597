"""Enqueues in a parent, and in its children right after the fork, while threads enqueue too."""

import os
import sys
import threading

from asyncmq_nats import NATSBackend, set_default_backend
from asyncmq_nats.sync import Queue

set_default_backend(NATSBackend(sys.argv[1]))
queue = Queue("mail")
queue.add("send", ["parent before"])
stop = threading.Event()


def add_until_stopped() -> None:
    while not stop.is_set():
        queue.add("send", ["thread"])


threads = [threading.Thread(target=add_until_stopped) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        queue.add("send", [f"child {number}"])
        queue.add("send", [f"child {number} again"])
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
stop.set()
for thread in threads:
    thread.join()
queue.add("send", ["parent after"])
sys.exit(any(codes))
