"""Whole-model tests: every zoo case is compiled and compared with an uncompiled run in wider arithmetic."""
