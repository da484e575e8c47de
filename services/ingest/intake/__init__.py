"""Intake: submits become durable jobs."""
