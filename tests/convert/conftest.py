"""What lies in originals/ needs the frameworks, and runs in their environment: test_originals.py starts it there."""

collect_ignore = ["originals"]
