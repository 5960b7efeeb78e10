"""Raw images to shards: sources, image checks, writers, the manifest and the stage runner."""
