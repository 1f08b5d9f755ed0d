"""Records of sums in Redis, keyspace `aggregator:`; segments of uploads and sums in Redis too, or in a directory."""
