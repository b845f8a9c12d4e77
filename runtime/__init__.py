"""What compiled code needs while it runs: groups, symmetric memory, expert stores, load counters and cost tables."""

from dscompile import refuse_bare_names

refuse_bare_names()
