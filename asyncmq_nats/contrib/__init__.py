"""Programs and bridges around the queue, each with an extra. They use only what is public."""
