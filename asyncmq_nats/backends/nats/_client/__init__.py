"""nats-py's client with shortcuts: the only code that uses private names of nats-py."""
