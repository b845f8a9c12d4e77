"""Lowering: from a semantic operator to a kernel call.

`ops/` holds the operators of the `dsinfra` namespace (schema, shape function, reference, autograd, FLOPs), `select`
the tables that choose an implementation at run time, `heuristics` the predicted costs behind a choice of form,
`errors` what a caller can do wrong. Importing this package registers nothing and imports no kernel:
`dscompile.lowering.ops` registers, and kernels load at their first use.
"""

from dscompile import refuse_bare_names

refuse_bare_names()
