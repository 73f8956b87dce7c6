"""`python -m benchmarks all` runs all scenarios; `append`, `context` and `list` one comparison."""

from benchmarks.cli import main

main()
