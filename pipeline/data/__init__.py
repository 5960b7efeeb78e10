"""From shards to batches: which sample when (`order`), where it is (`shards`), what a step gets (`loader`)."""
