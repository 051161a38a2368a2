"""Mesh, sharding rules and distributed set-up."""
