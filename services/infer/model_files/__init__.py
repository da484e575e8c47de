"""Models as files on disk: folders, versions, configuration."""
