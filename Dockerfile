# The image of the worker and the producer of docker-compose.yml.
FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY docs/protocol.md docs/
COPY asyncmq_nats asyncmq_nats
RUN pip install --no-cache-dir '.[cli,uvloop]'
COPY examples examples

RUN useradd --system asyncmq
USER asyncmq
