"""Passes over FX graphs: prove what a region computes, then rewrite it.

Reading order: `pipeline` (the ordered list), `recognize_mla` (one pass, whole), `structure` (its proof), `prove` (the
coordinates the proof is made of), `masks` and `rope` (facts), `absorb` (a transform). `shadow` is the graph that is
analysed, `emit` writes into the one that is compiled. Passes know graphs and operators, never a kernel.
"""

from dscompile import refuse_bare_names

refuse_bare_names()
