"""What the registry does: one method for each RPC, each owning its transaction."""
