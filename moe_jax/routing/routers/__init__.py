"""One file for each way of choosing experts; `moe_jax.routing.registry` finds them."""
