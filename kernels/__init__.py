"""Arrays in, arrays out: no gRPC, no asyncio. One operation per file."""
