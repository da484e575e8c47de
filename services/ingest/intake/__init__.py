"""The way in: submits become durable jobs."""
