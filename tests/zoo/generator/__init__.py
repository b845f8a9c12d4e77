"""Random modules with multi-head latent attention and experts, as source text, and the check that none answers wrong.

`program.py` says what a generated module is and renders it; `attention.py` and `moe.py` draw modules in the ways people
write them, `edits.py` changes single statements at random, `check.py` compares compiled with eager. A module either
holds the operators and agrees, or was refused with a reason: nothing else passes.
"""

from tests.zoo.generator.attention import attentions
from tests.zoo.generator.check import Verdict, compare
from tests.zoo.generator.edits import edited
from tests.zoo.generator.moe import layers
from tests.zoo.generator.program import Program

__all__ = ["Program", "Verdict", "attentions", "compare", "edited", "layers"]
