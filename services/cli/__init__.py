"""The `fedmesh` command."""
