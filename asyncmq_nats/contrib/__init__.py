"""Programs around the queue, each with an extra of its own. They use only what is public."""
