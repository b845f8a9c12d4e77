"""Small models that the backend must handle unmodified, and small ones that it must leave alone, as named cases.

`case.py` says what a case is; `toy.py` and `reference_form.py` are attention modules written by hand, `near_misses.py`
those that look like MLA and are not, `hf.py` builds micro models of transformers, `cases.py` lists everything.
"""

from tests.zoo.case import Example, Precision, ZooCase
from tests.zoo.cases import CASES, by_name, select

__all__ = ["CASES", "Example", "Precision", "ZooCase", "by_name", "select"]
