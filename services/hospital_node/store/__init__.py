"""The node's durable memory: SQLite databases and fsynced files in one private folder."""
