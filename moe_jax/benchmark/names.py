"""Names that flags of the benchmarks list; without JAX, so that --help comes at once."""

from moe_jax import schema

# Routings that are drawn, and the one that needs a run.
DRAWN = ('round_robin', 'uniform', 'zipf_0.5', 'zipf_1')
TRACE = 'trace'
ROUTINGS = (*DRAWN, TRACE)
# Arms of `dispatch`. copy: the bytes of dispatch and combine without an index, and no products.
ARMS = (*sorted(schema.SCHEMA['moe']['dispatch'].choices, reverse=True), 'ragged_dot', 'copy')
# Of a library that nothing else here needs; measured where it is named.
TOKAMAX = 'tokamax'
