"""One file for each router; `moe_jax.routing.registry` finds them."""
