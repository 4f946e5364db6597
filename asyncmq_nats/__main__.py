"""`python -m asyncmq_nats`: the command line."""

from asyncmq_nats.cli import main

if __name__ == "__main__":
    main()
