"""The test suite. A package, so that `tests.zoo` means this one whatever else is installed under that name."""
