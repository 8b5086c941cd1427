"""Speed of the public functions against what one would write without them; see docs/benchmarks.md."""
