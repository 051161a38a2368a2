"""From records of runs to tables and figures."""
