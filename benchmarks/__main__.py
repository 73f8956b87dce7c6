"""`python -m benchmarks`: all of it; `python -m benchmarks append --in-flight 64` and the like: one comparison."""

from benchmarks.cli import main

main()
