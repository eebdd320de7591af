"""What the server counts, in Prometheus' words."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("arcflow_requests", "Answers by route and status", ["route", "status"], registry=r)
        self.drawn = Counter("arcflow_pictures", "Images drawn", ["model"], registry=r)
        self.left = Counter("arcflow_left", "Images that nobody waited for any more", registry=r)
        self.waiting = Gauge("arcflow_waiting", "Images in the queue", registry=r)
        self.batch = Histogram(
            "arcflow_batch_size", "Images drawn together", registry=r, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.seconds = Histogram(
            "arcflow_batch_seconds", "Seconds of a batch by part", ["part"], registry=r, buckets=SECONDS
        )
        self.waited = Histogram("arcflow_waited_seconds", "Seconds in the queue", registry=r, buckets=SECONDS)
        self.busy = Counter("arcflow_busy_seconds", "Seconds in which the engine had a batch", registry=r)
        self.texts = Counter("arcflow_text", "Prompts looked up in the cache of encoded text", ["found"], registry=r)
        self.errors = Counter("arcflow_errors", "Batches that failed", ["kind"], registry=r)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
