"""Speed of the public functions against what one writes without them; see docs/benchmarks.md."""
