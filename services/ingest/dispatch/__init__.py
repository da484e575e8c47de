"""Dispatch of durable jobs until their ends: claims, attempts, results, leases."""
