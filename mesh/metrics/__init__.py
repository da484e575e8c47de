"""Metrics of a process: families, their readings, and the Prometheus form of them.

    plain integers and arrays where things happen ──a scrape reads them──> readings ──> text

families    a metric's name, kind, unit, help and labels; its name in Prometheus
histogram   counts by buckets, as plain arrays
exposition  readings as Prometheus' text or OpenMetrics
endpoint    GET of a page over HTTP/1.1, at a unix socket or a loopback port
process     metrics that every process has
"""
