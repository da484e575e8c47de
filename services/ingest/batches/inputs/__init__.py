"""Where rows come from: places, and readers of each format."""
