"""Names of routings and arms that flags list; without JAX, so that --help comes at once."""

from moe_jax import schema

# Routings that are drawn, and the one that needs a run.
DRAWN = ('round_robin', 'uniform', 'zipf_0.5', 'zipf_1')
TRACE = 'trace'
ROUTINGS = (*DRAWN, TRACE)
# Arms of `dispatch`. copy: the bytes of dispatch and combine without an index, and no matmuls.
ARMS = (*sorted(schema.SCHEMA['moe']['dispatch'].choices, reverse=True), 'ragged_dot', 'copy')
# Of a library that nothing else here needs; measured where it is named.
TOKAMAX = 'tokamax'
# Arms that drop nothing. Their matmuls are those of balanced rows, without a capacity factor.
DROPLESS = ('dropless', 'ragged_dot', TOKAMAX)
