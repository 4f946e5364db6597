import os
import socket
import subprocess
import time

import pytest

with socket.create_server(("127.0.0.1", 0)) as free:
    ADDRESS = free.getsockname()
os.environ["REDIS"] = "redis://{}:{}".format(*ADDRESS)


def is_served():
    try:
        socket.create_connection(ADDRESS).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def redis():
    with subprocess.Popen(["redis-server", "--port", str(ADDRESS[1]), "--save", ""]) as server:
        while not is_served():
            time.sleep(0.01)
        yield
        server.terminate()
